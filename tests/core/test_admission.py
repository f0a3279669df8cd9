"""Refuse early, and say honestly when to come back."""

from __future__ import annotations

import pytest

from powerband.core.admission import Admission, SchedulerLimits
from powerband.core.clock import VirtualClock
from powerband.core.kv_cache import KVCacheManager
from powerband.core.loop import Add, Command, EngineCore
from powerband.core.params import SamplingParams
from powerband.core.request import EngineRequest
from powerband.core.scheduler import Scheduler
from powerband.core.simulation import SimExecutor, TraceInbox, run_to_end
from powerband.core.step import FinishReason, TokenOutput
from powerband.errors import QueueFull, RequestTooLong, UsageError


def ask(id: str, prompt: int = 8, arrival_s: float = 0.0, output: int | None = 4, **more: float) -> EngineRequest:
    params = SamplingParams(max_tokens=output)
    return EngineRequest(id=id, token_ids=[1] * prompt, params=params, arrival_s=arrival_s, **more)  # type: ignore[arg-type]


def scheduler(num_blocks: int = 64, **limits: int) -> Scheduler:
    sizes = {"max_model_len": 128, "max_num_seqs": 1, "max_num_batched_tokens": 32, **limits}
    return Scheduler(KVCacheManager(num_blocks, 4), SchedulerLimits(**sizes))


def test_a_full_queue_refuses_but_free_seats_are_no_queue() -> None:
    s = scheduler(max_num_queued_reqs=2)
    for i in range(3):  # one can start at once, two wait
        s.add(ask(f"r{i}"), 0.0)
    with pytest.raises(QueueFull, match="requests waiting: 3; the limit is 2") as refusal:
        s.add(ask("r3"), 0.0)
    assert refusal.value.retry_after_s == 1.0  # nothing has started yet, so nothing is known
    assert s.stats().num_refused == 1
    s.abort("r1", FinishReason.ABORT, 0.0)
    s.add(ask("r4"), 0.0)


def test_waiting_tokens_are_limited_but_an_empty_queue_takes_any_prompt() -> None:
    s = scheduler(max_num_queued_tokens=10)
    s.add(ask("long", prompt=100), 0.0)
    with pytest.raises(QueueFull, match="100 prompt tokens are waiting and this request has 8; the limit is 10"):
        s.add(ask("next"), 0.0)


def test_refused_clients_that_return_when_told_are_taken() -> None:
    """40 clients at once for a queue of 4: each refused one comes back exactly when it was told to."""
    clock = VirtualClock()
    limits = SchedulerLimits(max_model_len=128, max_num_seqs=2, max_num_batched_tokens=32, max_num_queued_reqs=4)
    s = Scheduler(KVCacheManager(64, 4), limits)
    warm: list[tuple[float, Command]] = [(0.05 * i, Add(ask(f"w{i:02d}"))) for i in range(20)]
    crowd: list[tuple[float, Command]] = [(1.0, Add(ask(f"c{i:02d}", arrival_s=1.0))) for i in range(40)]
    refusals: dict[str, int] = {}
    done: set[str] = set()
    inbox = TraceInbox(clock, warm + crowd)
    core = EngineCore(s, SimExecutor(clock, lambda step: 0.01), clock, inbox)
    while core.busy:
        for output in core.step():
            if output.error is not None and output.error.retry_after_s is not None:
                refusals[output.id] = refusals.get(output.id, 0) + 1
                back_s = clock.now() + output.error.retry_after_s
                inbox.send(back_s, Add(ask(output.id, arrival_s=back_s)))
            elif output.finish_reason is not None:
                done.add(output.id)
    assert len(done) == 60
    assert len(refusals) >= 30
    assert max(refusals.values()) <= 3
    assert sum(refusals.values()) < 1.5 * len(refusals)  # most need to come back only once


def test_retry_after_follows_the_recent_speed() -> None:
    admission = Admission(SchedulerLimits(max_model_len=128, max_num_queued_reqs=1))
    for i in range(11):
        admission.started(0.5 * i)  # two starts per second

    def told() -> float:
        with pytest.raises(QueueFull) as refusal:
            admission.check_queue(8, 1, 8, 0, now=5.0)
        return refusal.value.retry_after_s

    assert [told() for _ in range(3)] == pytest.approx([0.5, 1.0, 1.5])
    for _ in range(3):
        admission.started(5.0)
    assert told() < 0.5


def test_a_deadline_out_of_reach_is_refused_at_once() -> None:
    limits = SchedulerLimits(max_model_len=128, max_num_seqs=1, max_num_batched_tokens=32)
    s = Scheduler(KVCacheManager(64, 4), limits, estimate_s=lambda ahead, prompt: (ahead + prompt) / 100)
    s.add(ask("first", prompt=100), 0.0)
    s.add(ask("patient", deadline_s=2.0), 0.0)
    with pytest.raises(QueueFull, match=r"0\.66 s after the deadline: 108 prompt tokens are ahead") as refusal:
        s.add(ask("urgent", deadline_s=0.5), 0.0)
    assert refusal.value.code == "deadline_infeasible"
    assert refusal.value.retry_after_s == pytest.approx(0.66)


@pytest.mark.parametrize(
    ("num_blocks", "prompt", "limit", "what"),
    [(64, 128, 127, "context"), (8, 32, 31, "KV cache"), (8, 100, 31, "KV cache")],
)
def test_a_prompt_that_can_never_fit_names_the_limit(num_blocks: int, prompt: int, limit: int, what: str) -> None:
    s = scheduler(num_blocks)
    with pytest.raises(RequestTooLong, match=f"{prompt} tokens; the {what} takes {limit} and one output") as refusal:
        s.add(ask("long", prompt=prompt), 0.0)
    assert refusal.value.limit == limit
    s.add(ask("longest", prompt=limit), 0.0)


@pytest.mark.parametrize(("num_blocks", "length"), [(64, 128), (8, 32)])
def test_output_ends_where_the_context_or_the_cache_does(num_blocks: int, length: int) -> None:
    clock = VirtualClock()
    executor = SimExecutor(clock, lambda step: 0.01, overlap=True)
    limits = SchedulerLimits(max_model_len=128, max_num_seqs=4, max_num_batched_tokens=32)
    s = Scheduler(KVCacheManager(num_blocks, 4), limits, relay=executor.relay)
    inbox = TraceInbox(clock, [(0.0, Add(ask("endless", prompt=5, output=None)))])
    outputs: list[TokenOutput] = run_to_end(EngineCore(s, executor, clock, inbox))
    assert sum(len(o.token_ids) for o in outputs) == length - 5
    assert outputs[-1].finish_reason == "length"


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UsageError, match=r"max_num_batched_tokens \(8\) is less than max_num_seqs \(16\)"):
        SchedulerLimits(max_model_len=128, max_num_seqs=16, max_num_batched_tokens=8)
    with pytest.raises(UsageError, match="max_model_len is 0"):
        SchedulerLimits(max_model_len=0)
