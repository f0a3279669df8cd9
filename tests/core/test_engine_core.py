"""The one loop in virtual time: requests in, tokens out."""

from __future__ import annotations

import queue
import threading
from itertools import pairwise

import pytest

from powerband.core.admission import SchedulerLimits
from powerband.core.clock import MonotonicClock, VirtualClock
from powerband.core.kv_cache import KVCacheManager
from powerband.core.loop import Abort, Add, Call, Command, EngineCore, StepRecord
from powerband.core.params import SamplingParams
from powerband.core.request import EngineRequest
from powerband.core.scheduler import Scheduler
from powerband.core.simulation import SimExecutor, SimHandle, TraceInbox, run_to_end
from powerband.core.step import ErrorInfo, FinishReason, Step, StepResult
from powerband.errors import EngineDead, EnvironmentFault


def ask(id: str, tokens: list[int], max_tokens: int = 4) -> EngineRequest:
    return EngineRequest(id=id, token_ids=tokens, params=SamplingParams(max_tokens=max_tokens), arrival_s=0.0)


def engine(events: list[tuple[float, Command]], *, overlap: bool = False, num_blocks: int = 64) -> EngineCore:
    clock = VirtualClock()
    executor = SimExecutor(clock, lambda step: 0.01, overlap=overlap)
    limits = SchedulerLimits(max_model_len=128, max_num_seqs=8, max_num_batched_tokens=32)
    scheduler = Scheduler(KVCacheManager(num_blocks, 4), limits, relay=executor.relay)
    return EngineCore(scheduler, executor, clock, TraceInbox(clock, events))


@pytest.mark.parametrize("overlap", [False, True])
def test_every_request_gets_its_tokens_and_gives_back_its_blocks(overlap: bool) -> None:
    core = engine([(0.0, Add(ask("a", [1] * 40))), (0.005, Add(ask("b", [2] * 3, max_tokens=9)))], overlap=overlap)
    outputs = run_to_end(core)
    assert {id: sum(len(o.token_ids) for o in outputs if o.id == id) for id in "ab"} == {"a": 4, "b": 9}
    assert [o.finish_reason for o in outputs if o.finish_reason] == [FinishReason.LENGTH] * 2
    assert core.scheduler.stats().cache.num_used == 0
    core.scheduler.kv.check()


def test_abort_ends_a_request_with_its_steps_in_flight() -> None:
    core = engine([(0.0, Add(ask("a", [1] * 5, max_tokens=100))), (0.1, Abort("a"))], overlap=True)
    outputs = run_to_end(core)
    assert outputs[-1].finish_reason is FinishReason.ABORT
    assert core.clock.now() < 0.15
    assert core.scheduler.stats().cache.num_used == 0


def test_a_prompt_that_can_never_fit_is_refused_alone() -> None:
    core = engine([(0.0, Add(ask("long", [1] * 200))), (0.0, Add(ask("short", [1] * 5)))])
    by_id = {o.id: o for o in run_to_end(core)}
    assert by_id["long"].error is not None
    assert by_id["long"].error.code == "context_length_exceeded"
    assert by_id["short"].finish_reason is FinishReason.LENGTH


class Breaking(SimExecutor):
    """Fails the steps whose index is in `lost`; `dead`: and cannot go on."""

    def __init__(self, clock: VirtualClock, lost: set[int], *, at_submit: bool, dead: bool = False) -> None:
        super().__init__(clock, lambda step: 0.01, overlap=True)
        self.lost, self.at_submit, self.dead = lost, at_submit, dead

    def submit(self, step: Step) -> SimHandle:
        if step.index in self.lost and self.at_submit:
            raise RuntimeError("no memory for step")
        handle = super().submit(step)
        if step.index in self.lost:
            handle.result = self.fail  # type: ignore[method-assign]
        return handle

    def fail(self) -> StepResult:
        raise RuntimeError("no memory for step")

    def check(self) -> None:
        if self.dead:
            raise EnvironmentFault("The device is gone.")


def breaking_engine(executor: Breaking, events: list[tuple[float, Command]]) -> EngineCore:
    limits = SchedulerLimits(max_model_len=128, max_num_seqs=8, max_num_batched_tokens=32)
    scheduler = Scheduler(KVCacheManager(64, 4), limits, relay=executor.relay)
    return EngineCore(scheduler, executor, executor.clock, TraceInbox(executor.clock, events))


@pytest.mark.parametrize("at_submit", [False, True])
def test_a_lost_step_ends_its_requests_and_no_others(at_submit: bool) -> None:
    clock = VirtualClock()
    core = breaking_engine(
        Breaking(clock, {2}, at_submit=at_submit), [(0.0, Add(ask("a", [1] * 5))), (0.025, Add(ask("b", [1] * 5)))]
    )
    last = {o.id: o for o in run_to_end(core)}
    assert last["a"].finish_reason is FinishReason.ERROR
    assert last["a"].error == ErrorInfo(
        "internal_error", "RuntimeError: no memory for step", "The engine's log says more."
    )
    assert last["b"].finish_reason is FinishReason.LENGTH
    core.scheduler.kv.check()


def test_a_dead_device_ends_the_loop() -> None:
    core = breaking_engine(Breaking(VirtualClock(), {1}, at_submit=False, dead=True), [(0.0, Add(ask("a", [1])))])
    with pytest.raises(EngineDead, match=r"The engine's device failed: The device is gone\."):
        run_to_end(core)


def test_a_request_that_makes_no_sense_is_refused_and_the_loop_goes_on() -> None:
    nonsense = ask("a", ["x"])  # type: ignore[list-item]
    core = engine([(0.0, Add(nonsense)), (0.0, Add(ask("b", [1] * 5)))])
    last = {o.id: o for o in run_to_end(core)}
    assert last["a"].error is not None
    assert last["a"].error.http_status == 400
    assert last["b"].finish_reason is FinishReason.LENGTH


def test_queue_full_reaches_the_client_with_a_time_to_return() -> None:
    clock = VirtualClock()
    limits = SchedulerLimits(max_model_len=128, max_num_seqs=1, max_num_batched_tokens=32, max_num_queued_reqs=1)
    scheduler = Scheduler(KVCacheManager(64, 4), limits)
    inbox = TraceInbox(clock, [(0.0, Add(ask(id, [1] * 5))) for id in "abc"])
    outputs = run_to_end(EngineCore(scheduler, SimExecutor(clock, lambda step: 0.01), clock, inbox))
    refused = next(o for o in outputs if o.id == "c")
    assert refused.error is not None
    assert (refused.error.code, refused.error.http_status, refused.error.retry_after_s) == ("queue_full", 429, 1.0)


def test_every_finished_step_is_observed() -> None:
    records: list[StepRecord] = []
    core = engine([(0.0, Add(ask("a", [1] * 40)))], overlap=True)
    core.observer = records.append
    run_to_end(core)
    assert [record.step.num_tokens for record in records] == [32, 8, 1, 1, 1]
    assert [record.step.index for record in records] == [1, 2, 3, 4, 5]
    assert sum(record.exclusive_s for record in records) == pytest.approx(core.clock.now())
    assert max(record.seconds for record in records) == pytest.approx(0.02)  # two steps in flight
    assert records[0].usage.num_used == 10


def test_administration_runs_between_steps() -> None:
    core = engine([(0.0, Add(ask("a", [1] * 5, max_tokens=50)))])
    inbox = core.inbox
    assert isinstance(inbox, TraceInbox)
    inbox.send(0.1, Call(core.scheduler.pause))
    inbox.send(5.0, Call(core.scheduler.resume))
    times = [o.time_s for o in run_to_end(core)]
    assert max(b - a for a, b in pairwise(times)) == pytest.approx(4.9, abs=0.02)


def test_a_stop_found_outside_is_told_as_a_stop() -> None:
    core = engine(
        [(0.0, Add(ask("a", [1] * 5, max_tokens=50))), (0.1, Abort("a", FinishReason.STOP)), (0.2, Abort("a"))]
    )
    assert [o.finish_reason for o in run_to_end(core) if o.finish_reason] == [FinishReason.STOP]


def test_an_idle_engine_is_woken_by_a_command_from_another_thread() -> None:
    """The inbox of a live engine: `wait` blocks on a queue, so that the loop starts as soon as something comes."""

    class LiveInbox:
        def __init__(self) -> None:
            self.queue: queue.SimpleQueue[Command] = queue.SimpleQueue()
            self.first: list[Command] = []

        def poll(self, now: float) -> list[Command]:
            commands, self.first = self.first, []
            while not self.queue.empty():
                commands.append(self.queue.get())
            return commands

        def next_time(self) -> float | None:
            return None

        def wait(self, until: float | None) -> None:
            self.first.append(self.queue.get(timeout=10))

    inbox, clock = LiveInbox(), MonotonicClock()
    limits = SchedulerLimits(max_model_len=128, max_num_seqs=8, max_num_batched_tokens=32)
    executor = SimExecutor(clock, lambda step: 0.0)
    core = EngineCore(Scheduler(KVCacheManager(64, 4), limits), executor, clock, inbox)
    other = threading.Thread(target=lambda: inbox.queue.put(Add(ask("a", [1] * 5))))
    other.start()
    outputs = core.step()  # nothing yet: waits, and returns when the request is there
    while core.busy or not outputs:
        outputs += core.step()
    other.join()
    assert sum(len(o.token_ids) for o in outputs) == 4


def test_the_virtual_clock_never_goes_back() -> None:
    clock = VirtualClock(5.0)
    clock.wait_until(3.0)
    assert clock.now() == 5.0
