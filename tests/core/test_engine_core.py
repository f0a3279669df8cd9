"""The one loop in virtual time: requests in, tokens out."""

from __future__ import annotations

import pytest

from powerband.core.admission import SchedulerLimits
from powerband.core.clock import VirtualClock
from powerband.core.kv_cache import KVCacheManager
from powerband.core.loop import Abort, Add, Command, EngineCore
from powerband.core.params import SamplingParams
from powerband.core.request import EngineRequest
from powerband.core.scheduler import Scheduler
from powerband.core.simulation import SimExecutor, TraceInbox, run_to_end
from powerband.core.step import FinishReason


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
