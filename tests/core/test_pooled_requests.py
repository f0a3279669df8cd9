"""Prompts that are pooled: over when they are computed, alone in their failure, and whole where a model needs that."""

from __future__ import annotations

from powerband.core.admission import SchedulerLimits
from powerband.core.kv_cache import KVCacheManager
from powerband.core.params import PoolingParams, SamplingParams
from powerband.core.request import EngineRequest
from powerband.core.scheduler import Scheduler
from powerband.core.step import FinishReason, StepResult

VECTOR = b"\0\0\x80?"


def scheduler(*, budget: int = 8, relay: int = 0, whole_prompts: bool = False) -> Scheduler:
    limits = SchedulerLimits(max_model_len=64, max_num_seqs=4, max_num_batched_tokens=budget)
    return Scheduler(KVCacheManager(64, 4), limits, relay=relay, whole_prompts=whole_prompts)


def add(s: Scheduler, id: str, length: int) -> None:
    params = SamplingParams(max_tokens=1)
    tokens = list(range(length))
    s.add(EngineRequest(id=id, token_ids=tokens, params=params, arrival_s=0.0, pooling=PoolingParams()), 0.0)


def lengths(s: Scheduler) -> dict[str, int]:
    step = s.schedule(0.0)
    return {} if step is None else {work.id: work.num_tokens for work in step.works}


def test_nothing_is_scheduled_on_top_of_a_prompt_that_is_pooled() -> None:
    s = scheduler(relay=1)
    add(s, "a", 12)
    first, second = s.schedule(0.0), s.schedule(0.0)
    assert first is not None
    assert second is not None
    assert [work.samples for step in (first, second) for work in step.works] == [False, True]
    assert s.schedule(0.0) is None
    assert s.update(first, StepResult({}), 0.0) == []
    [output] = s.update(second, StepResult({}, vectors={"a": VECTOR}), 0.0)
    assert (output.vector, output.finish_reason, output.token_ids) == (VECTOR, FinishReason.STOP, [])
    assert not s.requests
    assert s.kv.usage().num_used == 0


def test_a_missing_vector_ends_only_its_own_request() -> None:
    s = scheduler()
    add(s, "a", 3)
    add(s, "b", 3)
    step = s.schedule(0.0)
    assert step is not None
    outputs = {output.id: output for output in s.update(step, StepResult({}, vectors={"b": VECTOR}), 0.0)}
    assert outputs["a"].finish_reason is FinishReason.ERROR
    assert outputs["b"].vector == VECTOR


def test_a_whole_prompt_waits_for_a_step_that_has_room_for_it() -> None:
    s = scheduler(whole_prompts=True)
    for id, length in (("a", 5), ("b", 6), ("c", 2)):
        add(s, id, length)
    assert [lengths(s), lengths(s)] == [{"a": 5}, {"b": 6, "c": 2}]


def test_the_tokens_of_a_pooled_prompt_may_be_the_whole_context() -> None:
    s = scheduler(budget=64)
    add(s, "a", 64)
    assert lengths(s) == {"a": 64}
