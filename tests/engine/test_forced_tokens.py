"""Tokens that a grammar leaves no choice about: they cost no step of their own, and nothing else differs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from engines_for_tests import TestEngine
from llguidance import LLMatcher

from powerband import LLM, SamplingParams, StructuredOutputsParams
from powerband.core.loop import StepRecord
from powerband.engine.executor import grammar_masks
from powerband.structured.specification import grammar_of

SETTINGS: dict[str, Any] = {
    "load_format": "dummy",
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "block_size": 8,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "max_model_len": 512,
    "kv_cache_memory": "16MiB",
}
ORDER = {
    "type": "object",
    "properties": {
        "identifier_of_the_customer": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind_of_delivery": {"enum": ["express to the door", "express to the shop", "parcel"]},
        "note": {"type": "string", "maxLength": 6},
        "version_of_this_form": {"const": {"major": 12, "minor": [1, "beta"]}},
    },
    "required": ["identifier_of_the_customer", "kind_of_delivery", "note", "version_of_this_form"],
    "additionalProperties": False,
}
COMPACT = StructuredOutputsParams(json=ORDER, disable_any_whitespace=True)
FORMS = [
    COMPACT,
    StructuredOutputsParams(json=ORDER),
    StructuredOutputsParams(regex="the [ab]{3} of the whole story is (yes|no|yesterday), and nothing else[.!]"),
    StructuredOutputsParams(choice=["a long answer, the first", "a long answer, the second"]),
    None,
]
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logit_bias": {300: 5.0}, "top_p": 0.9},
    {"min_tokens": 12, "stop_token_ids": [100, 300, 301, 302]},
    {"top_k": 5, "presence_penalty": 0.7, "stop": ["press", "story"]},
    {"ignore_eos": True, "min_p": 0.1},
    {"bad_words": ["beta", "the"], "prompt_logprobs": 0},
]
PROMPTS = [f"{'A long prompt. ' * (i % 3)}The order is" for i in range(14)]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", **SETTINGS) as llm:
        yield llm


def asked(**params: Any) -> list[SamplingParams]:
    """Every form and every way, in pairs."""
    every: dict[str, Any] = {"temperature": 1.5, "max_tokens": 50, **params}
    return [
        SamplingParams(**{**every, "seed": i, "structured_outputs": FORMS[i % 5], **WAYS[i % 7]})
        for i in range(len(PROMPTS))
    ]


def answers(llm: LLM, params: list[SamplingParams] | None = None) -> list[tuple[Any, ...]]:
    results = llm.generate(PROMPTS, params or asked(), use_tqdm=False)
    return [
        (output.token_ids, output.text, output.finish_reason, output.stop_reason)
        for result in results
        for output in result.outputs
    ]


def one_by_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(grammar_masks, "_take_forced", lambda _state, _matcher: [])


@pytest.fixture(scope="module")
def sampled(llm: LLM) -> list[tuple[Any, ...]]:
    """The answers whose tokens are sampled one by one."""
    with pytest.MonkeyPatch.context() as patch:
        one_by_one(patch)
        return answers(llm)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"async_scheduling": True},
        {"max_num_batched_tokens": 8, "enable_prefix_caching": False},
        {"kv_cache_memory": "1MiB", "max_model_len": 168, "enable_prefix_caching": False, "async_scheduling": True},
        {"kernels": "off", "attention_backend": "reference"},
    ],
    ids=["alone", "overlap", "chunks", "preemption", "reference"],
)
def test_answers_are_those_of_tokens_that_are_sampled_one_by_one(
    sampled: list[tuple[Any, ...]], changes: dict[str, Any]
) -> None:
    with LLM("demo", **SETTINGS | changes) as other:
        assert answers(other) == sampled
        is_preempted = other._engine.scheduler.stats().num_preemptions > 0
    assert is_preempted == ("kv_cache_memory" in changes)


def test_so_are_the_answers_to_one_prompt_and_those_that_are_cut_off(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> list[Any]:
        params = [SamplingParams(temperature=2.0, seed=1, n=5, max_tokens=70, structured_outputs=COMPACT)]
        params += [SamplingParams(temperature=0.0, max_tokens=n, structured_outputs=COMPACT) for n in range(1, 41, 8)]
        results = llm.generate(["The order is"] * len(params), params, use_tqdm=False)
        return [(output.token_ids, output.finish_reason) for result in results for output in result.outputs]

    fast = made()
    assert [len(ids) for ids, _ in fast[5:]] == list(range(1, 41, 8))
    assert {reason for _, reason in fast[5:]} == {"length"}
    one_by_one(monkeypatch)
    assert made() == fast


def num_steps(llm: LLM, params: SamplingParams) -> tuple[int, Any]:
    """Steps of one answer, and the answer."""
    records: list[StepRecord] = []
    llm._engine.core.observer = records.append
    [result] = llm.generate("The order is", params, use_tqdm=False)
    llm._engine.core.observer = None
    return len(records), result.outputs[0]


def test_they_cost_no_step_of_their_own(llm: LLM) -> None:
    steps, output = num_steps(llm, SamplingParams(temperature=0.0, max_tokens=100, structured_outputs=COMPACT))
    assert output.finish_reason == "stop"
    assert steps < len(output.token_ids) / 2


def test_where_log_probabilities_are_asked_for_every_token_has_its_own(llm: LLM) -> None:
    params = {"temperature": 0.0, "max_tokens": 100, "structured_outputs": COMPACT}
    _, fast = num_steps(llm, SamplingParams(**params))
    steps, output = num_steps(llm, SamplingParams(**params, logprobs=0))
    assert output.token_ids == fast.token_ids
    assert steps == len(output.token_ids) == len(output.logprobs)


def test_what_else_forbids_the_only_token_ends_the_answer_in_an_error(llm: LLM) -> None:
    form = StructuredOutputsParams(choice=["a long answer, the first"])
    *others, last = llm.generate("x", SamplingParams(structured_outputs=form), use_tqdm=False)[0].outputs[0].token_ids
    forbidden: list[dict[str, Any]] = [{"allowed_token_ids": others}, {"min_tokens": 16, "stop_token_ids": [last]}]
    for params in forbidden:
        [result] = llm.generate("x", SamplingParams(structured_outputs=form, **params), use_tqdm=False)
        assert result.outputs[0].finish_reason == "error", params


def allowed(matcher: LLMatcher) -> list[int]:
    mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return [int(id) for id in np.flatnonzero(np.unpackbits(mask, bitorder="little"))]


@pytest.mark.parametrize("form", [form for form in FORMS if form is not None], ids=lambda form: form.kind)
def test_each_mask_allows_the_next_forced_token_and_no_other(llm: LLM, form: StructuredOutputsParams) -> None:
    """What llguidance promises: otherwise a token would be taken that the sampler might not have chosen."""
    grammars = llm._engine.grammars
    assert grammars is not None
    grammar = grammar_of(form, grammars.tokens)
    for seed in range(4):
        chance, matcher, expected = random.Random(seed), grammars.matcher(grammar), []
        while not matcher.is_stopped():
            forced = matcher.compute_ff_tokens()
            assert forced[: len(expected)] == expected
            ids = allowed(matcher)
            assert (ids == forced[:1]) == bool(forced) == (len(ids) == 1)
            expected = forced[1:]
            assert matcher.consume_token(chance.choice(ids))


def test_an_answer_is_continued_from_the_middle_of_forced_tokens() -> None:
    with TestEngine("demo", **SETTINGS) as engine:
        params: dict[str, Any] = {"grammar": "start: /[ab] is not a long answer[.!]/", "max_tokens": 30, "seed": 4}
        [whole] = engine.generate([[5, 6, 7]], temperature=1.5, **params)
        for cut in range(1, len(whole)):
            id = engine.add([5, 6, 7], temperature=1.5, **params)
            engine.inbox.commands[-1].request.resumed_ids = whole[:cut]
            assert [token for output in engine.run()[id] for token in output.token_ids] == whole[cut:]
