"""What a step contains, by example."""

from __future__ import annotations

from typing import Any

from powerband.core.admission import SchedulerLimits
from powerband.core.kv_cache import KVCacheManager
from powerband.core.params import SamplingParams
from powerband.core.request import EngineRequest
from powerband.core.scheduler import Scheduler
from powerband.core.step import ErrorInfo, FinishReason, Step, StepResult, TokenLogprobs, TokenOutput


def scheduler(*, num_blocks: int = 64, relay: int = 0, **limits: int) -> Scheduler:
    sizes = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 16, **limits}
    return Scheduler(KVCacheManager(num_blocks, 4), SchedulerLimits(**sizes), relay=relay)


def add(s: Scheduler, id: str, prompt: int, first: int = 1, arrival_s: float = 0.0, **params: Any) -> None:
    chosen = SamplingParams(**{"max_tokens": 20, **params})
    tokens = [first, *range(100, 99 + prompt)]
    s.add(EngineRequest(id=id, token_ids=tokens, params=chosen, arrival_s=arrival_s), 0.0)


def shape(step: Step | None) -> list[tuple[str, int, int, bool]]:
    return [(w.id, w.start, w.num_tokens, w.samples) for w in step.works] if step else []


def run(s: Scheduler, **tokens: list[int]) -> tuple[Step, list[TokenOutput]]:
    """Schedule, and let every sampling work yield 7 or what is given for it."""
    step = s.schedule(0.0)
    assert step is not None
    return step, s.update(step, StepResult({w.id: tokens.get(w.id, [7]) for w in step.works if w.samples}), 0.0)


def test_a_long_prompt_comes_in_chunks_and_decodes_do_not_wait_for_it() -> None:
    s = scheduler()
    add(s, "a", 4)
    run(s)
    add(s, "b", 40, first=2)
    assert [shape(run(s)[0]) for _ in range(4)] == [
        [("a", 4, 1, True), ("b", 0, 15, False)],
        [("a", 5, 1, True), ("b", 15, 15, False)],
        [("a", 6, 1, True), ("b", 30, 10, True)],
        [("a", 7, 1, True), ("b", 40, 1, True)],
    ]


def test_the_threshold_bounds_a_chunk() -> None:
    s = scheduler(long_prefill_token_threshold=6)
    add(s, "a", 10)
    add(s, "b", 10, first=2)
    assert shape(s.schedule(0.0)) == [("a", 0, 6, False), ("b", 0, 6, False)]


def test_prompts_whose_logprobs_are_asked_for_share_a_small_chunk() -> None:
    s = scheduler(num_blocks=512, max_model_len=1024, max_num_batched_tokens=1024)
    add(s, "a", 300, prompt_logprobs=1)
    add(s, "b", 300, first=2, prompt_logprobs=1)
    assert [shape(s.schedule(0.0)) for _ in range(3)] == [
        [("a", 0, 256, False)],
        [("a", 256, 44, True), ("b", 0, 212, False)],
        [("b", 212, 88, True)],
    ]


def test_a_request_of_the_same_step_shares_what_another_computes_in_it() -> None:
    s = scheduler()
    for id in "ab":
        add(s, id, 9)
    step = s.schedule(0.0)
    assert step is not None
    assert shape(step) == [("a", 0, 9, True), ("b", 8, 1, True)]
    assert step.works[1].new_blocks[:2] == step.works[0].new_blocks[:2]


def test_with_a_relay_the_next_step_is_made_before_the_token_is_known() -> None:
    s = scheduler(relay=1)
    add(s, "a", 4)
    first, second = s.schedule(0.0), s.schedule(0.0)
    assert (shape(first), shape(second)) == ([("a", 0, 4, True)], [("a", 4, 1, True)])
    assert s.schedule(0.0) is None  # two unconfirmed samples would be one too many


def test_preemption_takes_the_last_and_sends_its_full_state_again() -> None:
    s = scheduler(num_blocks=6)
    add(s, "a", 8, arrival_s=0.0)
    add(s, "b", 8, first=2, arrival_s=1.0)
    epochs = set()
    for _ in range(40):
        step, outputs = run(s)
        for w in step.works:
            if w.id == "b" and w.new is not None:
                epochs.add(w.epoch)
                last = w.new
        if not s.requests:
            break
    assert len(epochs) == 2
    assert last.token_ids[8:] == [7] * (len(last.token_ids) - 8)
    assert last.num_prompt_tokens == 8 < len(last.token_ids)
    assert (outputs[-1].id, outputs[-1].num_preemptions, s.stats().num_preemptions) == ("b", 1, 1)


def test_an_ended_request_is_dropped_in_the_next_step() -> None:
    s = scheduler()
    add(s, "a", 4, max_tokens=1)
    add(s, "b", 4, first=2)
    assert run(s)[1][0].finish_reason is FinishReason.LENGTH
    step = s.schedule(0.0)
    assert step is not None
    assert step.dropped == ["a"]


def test_stop_rules() -> None:
    def ends(token: int, **params: Any) -> tuple[FinishReason | None, int | None]:
        s = scheduler()
        add(s, "a", 4, eos_token_ids=[50], **params)
        output = run(s, a=[token])[1][0]
        return output.finish_reason, output.stop_token_id

    assert ends(50) == (FinishReason.STOP, 50)
    assert ends(50, ignore_eos=True) == (None, None)
    assert ends(51, stop_token_ids=[51], ignore_eos=True) == (FinishReason.STOP, 51)
    assert ends(50, min_tokens=2) == (None, None)
    assert ends(50, max_tokens=1) == (FinishReason.STOP, 50)
    assert ends(7, max_tokens=1) == (FinishReason.LENGTH, None)


def test_accepted_drafts_after_a_stop_do_not_count() -> None:
    s = scheduler()
    s.propose = lambda r: [8, 50, 9]
    add(s, "a", 4, eos_token_ids=[50])
    run(s)
    step = s.schedule(0.0)
    assert step is not None
    assert (step.works[0].drafts, step.works[0].num_tokens) == ([8, 50, 9], 4)
    rows = [TokenLogprobs([t], [0.0], 1) for t in (8, 50, 9, 6)]
    (output,) = s.update(step, StepResult({"a": [8, 50, 9, 6]}, {"a": rows}), 0.0)
    assert (output.token_ids, output.stop_token_id) == ([8, 50], 50)
    assert output.logprobs == rows[:2]


def test_what_a_grammar_forces_is_computed_like_a_prompt() -> None:
    s = scheduler()
    add(s, "a", 4, grammar="start: /[ab] and so on[.!]/")
    step = s.schedule(0.0)
    assert step is not None
    (output,) = s.update(step, StepResult({"a": [7]}, forced={"a": [11, 12, 13]}), 0.0)
    assert (output.token_ids, output.finish_reason) == ([7, 11, 12, 13], None)
    assert shape(run(s)[0]) == [("a", 4, 4, True)]
    assert s.stats().generation_tokens == 5


def test_a_failed_request_fails_alone() -> None:
    s = scheduler()
    add(s, "a", 4)
    add(s, "b", 4, first=2)
    step = s.schedule(0.0)
    assert step is not None
    error = ErrorInfo("nan", "The model's output for this request is not a number.")
    outputs = {o.id: o for o in s.update(step, StepResult({"b": [7]}, failed={"a": error}), 0.0)}
    assert (outputs["a"].finish_reason, outputs["a"].error) == (FinishReason.ERROR, error)
    assert outputs["b"].finish_reason is None


def test_an_executor_that_forgets_a_request_costs_only_that_request() -> None:
    s = scheduler()
    add(s, "a", 4)
    add(s, "b", 4, first=2)
    step = s.schedule(0.0)
    assert step is not None
    outputs = {o.id: o for o in s.update(step, StepResult({"b": [7]}), 0.0)}
    assert outputs["a"].error is not None
    assert outputs["a"].error.message == "The executor returned 0 tokens where 1 to 1 were due."
    assert outputs["b"].token_ids == [7]


def test_pipeline_stages_share_the_decodes() -> None:
    s = scheduler()
    s.num_stages = 2
    for i in range(4):
        add(s, f"r{i}", 2, first=i)
    run(s)
    assert [len(shape(s.schedule(0.0))) for _ in range(3)] == [2, 2, 0]


def test_stats_count_tokens_and_hits() -> None:
    s = scheduler()
    add(s, "a", 9)
    add(s, "b", 9)
    run(s)
    stats = s.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_steps) == (2, 0, 1)
    assert (stats.prompt_tokens, stats.generation_tokens) == (18, 2)
    assert (stats.prefix_queries, stats.prefix_hits) == (18, 8)
    assert stats.cache.num_used == 4


def test_choices_of_one_prompt_compute_it_once_even_in_one_step() -> None:
    s = scheduler(max_num_batched_tokens=64)
    for choice in "abc":
        add(s, choice, 22)
    step, _ = run(s)
    assert shape(step) == [("a", 0, 22, True), ("b", 20, 2, True), ("c", 20, 2, True)]  # blocks of four are shared


def test_choices_of_a_prompt_in_chunks_wait_for_it_and_share_it() -> None:
    s = scheduler(max_num_batched_tokens=16)
    for choice in "abc":
        add(s, choice, 40)
    prefilled = sum(w.num_tokens for _ in range(6) for w in run(s)[0].works if w.start < 40)
    assert prefilled == 40 + 2 * 4  # of the others, only the last block: the last token has to be computed
