"""Answers of a form: with random weights and a high temperature, whatever is complete has the form that was asked."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from engines_for_tests import TestEngine
from scipy.stats import chisquare

from powerband import LLM, SamplingParams, StructuredOutputsParams
from powerband.engine.client.output_reader import OutputReader
from powerband.errors import InvalidRequest

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
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", **SETTINGS) as llm:
        yield llm


def answers(
    llm: LLM, form: StructuredOutputsParams | None, prompts: list[str] | None = None, **params: Any
) -> list[Any]:
    asked = SamplingParams(**{"temperature": 2.0, "max_tokens": 80, "seed": 1, "structured_outputs": form, **params})
    results = llm.generate(prompts or ["The list is"], asked, use_tqdm=False)
    return [output for result in results for output in result.outputs]


def test_json_validates(llm: LLM) -> None:
    made = answers(llm, StructuredOutputsParams(json=PERSON), n=16)
    complete = [output for output in made if output.finish_reason == "stop"]
    assert len(complete) > 4
    for output in complete:
        jsonschema.validate(json.loads(output.text), PERSON)


def test_a_schema_may_come_as_json(llm: LLM) -> None:
    forms = [StructuredOutputsParams(json=form) for form in (PERSON, json.dumps(PERSON))]
    first, second = ([output.token_ids for output in answers(llm, form, n=4)] for form in forms)
    assert first == second


@pytest.mark.parametrize("pattern", [r"\d{3}-\d{4}", r"(red|green)+!", r"^[a-f\w]{4}\W$", "a/b?c"])
def test_regular_expressions_match_the_whole_answer(llm: LLM, pattern: str) -> None:
    made = answers(llm, StructuredOutputsParams(regex=pattern), n=8)
    complete = [output for output in made if output.finish_reason == "stop"]
    assert complete
    assert all(re.fullmatch(pattern, output.text) for output in complete)


def test_one_of_the_choices_is_made_and_every_one_can_be(llm: LLM) -> None:
    choices = ["red", "green", 'a "quoted" one\n', "日本"]
    made = {output.text for output in answers(llm, StructuredOutputsParams(choice=choices), n=64)}
    assert made == set(choices)


def test_the_last_token_of_the_form_ends_the_answer(llm: LLM) -> None:
    [output] = answers(llm, StructuredOutputsParams(regex="[ab]{5}"), ignore_eos=True, min_tokens=50)
    assert re.fullmatch("[ab]{5}", output.text)
    assert output.finish_reason == "stop"


def test_a_form_is_refused_before_anything_starts_where_it_cannot_be_followed(llm: LLM) -> None:
    with pytest.raises(
        InvalidRequest, match=r"Prompt 0: 'structured_outputs.json.properties.a.not' cannot be enforced"
    ):
        answers(llm, StructuredOutputsParams(json={"properties": {"a": {"not": {"type": "string"}}}}))


FORMS = [
    StructuredOutputsParams(json=PERSON),
    StructuredOutputsParams(regex="[a-z]{2,30}"),
    None,
    StructuredOutputsParams(json_object=True),
]
MANY = [f"{'A long prompt. ' * (2 * i)}The list is" for i in range(12)]


PENALTIES = {
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.5,
    "logit_bias": {300: 5.0},
    "top_p": 0.9,
    "min_tokens": 5,
}
WAYS: list[dict[str, Any]] = [{}, PENALTIES, {"temperature": 0.0}]


def mixed(llm: LLM) -> list[list[int]]:
    """Requests with and without a form, in one batch."""
    asked = [
        SamplingParams(
            **{"temperature": 1.5, "max_tokens": 24, "seed": i, "structured_outputs": FORMS[i % 4], **WAYS[i % 3]}
        )
        for i in range(len(MANY))
    ]
    return [result.outputs[0].token_ids for result in llm.generate(MANY, asked, use_tqdm=False)]


@pytest.fixture(scope="module")
def plain(llm: LLM) -> list[list[int]]:
    return mixed(llm)


@pytest.mark.parametrize(
    "changes",
    [
        {"async_scheduling": True},
        {"max_num_batched_tokens": 16, "enable_prefix_caching": False},
        {"kv_cache_memory": "1MiB", "max_model_len": 168, "enable_prefix_caching": False, "async_scheduling": True},
        {"kernels": "off", "attention_backend": "reference"},
    ],
    ids=["overlap", "chunks", "preemption", "reference"],
)
def test_answers_are_the_same_in_any_batch(plain: list[list[int]], changes: dict[str, Any]) -> None:
    with LLM("demo", **SETTINGS | changes) as other:
        assert mixed(other) == plain
        is_preempted = other._engine.scheduler.stats().num_preemptions > 0
    assert is_preempted == ("kv_cache_memory" in changes)


def test_answers_of_one_prompt_follow_its_form_each_for_itself(llm: LLM) -> None:
    together = [output.token_ids for output in answers(llm, StructuredOutputsParams(regex="[a-z]{9}"), n=6, seed=3)]
    alone = [answers(llm, StructuredOutputsParams(regex="[a-z]{9}"), seed=3 + index)[0].token_ids for index in range(6)]
    assert together == alone
    assert len(set(map(tuple, together))) > 1


def test_a_stop_string_a_length_and_min_tokens_end_an_answer_before_its_form_does(llm: LLM) -> None:
    form = StructuredOutputsParams(regex="[ab]{40}")
    [stopped] = answers(llm, form, stop=["ab"], include_stop_str_in_output=True)
    assert re.fullmatch("[ab]*ab", stopped.text)
    [cut] = answers(llm, form, max_tokens=3)
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 3)
    [held] = answers(llm, StructuredOutputsParams(regex="[ab]+"), min_tokens=30)
    assert len(held.token_ids) >= 30


def test_the_log_probability_is_the_models_own(llm: LLM) -> None:
    """As with allowed tokens: what a form forbids does not raise what is left."""
    [output] = answers(llm, StructuredOutputsParams(choice=["a", "b"]), logprobs=0)
    [id] = output.token_ids
    prompt = [*llm.get_tokenizer().encode("The list is"), id]
    scored = llm.generate(prompt, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)[0]
    assert output.logprobs[0][id].logprob == pytest.approx(scored.prompt_logprobs[-1][id].logprob, abs=1e-4)


def test_what_a_form_and_other_parameters_leave_nothing_of_ends_alone_in_an_error(llm: LLM) -> None:
    asked = [
        SamplingParams(structured_outputs=StructuredOutputsParams(choice=["a"]), allowed_token_ids=[5]),
        SamplingParams(structured_outputs=StructuredOutputsParams(choice=["a"])),
    ]
    refused, answered = llm.generate(["x", "x"], asked, use_tqdm=False)
    assert refused.outputs[0].finish_reason == "error"
    assert answered.outputs[0].text == "a"


def score(llm: LLM, prompt: list[int], ids: list[int]) -> list[float]:
    """The model's probabilities of tokens after a prompt."""
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0)
    results = llm.generate([[*prompt, id] for id in ids], asked, use_tqdm=False)
    return [math.exp(result.prompt_logprobs[-1][id].logprob) for result, id in zip(results, ids, strict=True)]


def expected(llm: LLM, grammar: str, prompt: list[int], done: tuple[int, ...] = (), p: float = 1.0) -> dict[Any, float]:
    """The probability of every answer: at each step, the model's among the tokens that the grammar allows."""
    grammars = llm._engine.grammars
    matcher = grammars.matcher(grammar)
    assert matcher.consume_tokens(list(done))
    if matcher.is_stopped():
        return {done: p}
    mask = matcher.compute_bitmask()
    ids = [id for id in range(llm.info.vocab_size) if mask[id // 8] >> (id % 8) & 1]
    weights = score(llm, [*prompt, *done], ids) if len(ids) > 1 else [1.0]
    found: dict[Any, float] = {}
    for id, weight in zip(ids, weights, strict=True):
        found |= expected(llm, grammar, prompt, (*done, id), p * weight / sum(weights))
    return found


@pytest.mark.parametrize("pattern", ["[ab]{2}", "(now|never) or at last [ab]!"], ids=["all chosen", "some forced"])
def test_an_answer_is_as_likely_as_the_model_has_it_among_those_of_the_form(llm: LLM, pattern: str) -> None:
    form = StructuredOutputsParams(regex=pattern)
    prompt = llm.get_tokenizer().encode("The list is")
    whole = llm._reader._complete(SamplingParams(structured_outputs=form), len(prompt), OutputReader())
    likely = expected(llm, whole.grammar, prompt)
    assert sum(likely.values()) == pytest.approx(1)
    asked = [SamplingParams(temperature=1.0, n=100, seed=1000 * i, structured_outputs=form) for i in range(10)]
    results = llm.generate([prompt] * len(asked), asked, use_tqdm=False)
    seen = Counter(tuple(output.token_ids) for result in results for output in result.outputs)
    assert set(seen) <= set(likely)
    common = [answer for answer, p in likely.items() if p * 1000 >= 5]
    rest = 1000 - sum(seen[answer] for answer in common), 1 - sum(likely[answer] for answer in common)
    counts = [seen[answer] for answer in common] + ([rest[0]] if rest[1] > 1e-9 else [])
    shares = [likely[answer] for answer in common] + ([rest[1]] if rest[1] > 1e-9 else [])
    assert chisquare(counts, [1000 * share for share in shares]).pvalue > 1e-4


def test_an_answer_is_continued_after_tokens_of_another_replica() -> None:
    with TestEngine("demo", **SETTINGS) as engine:
        [grammar] = ["start: /[a-z]{12}/"]
        params: dict[str, Any] = {"grammar": grammar, "max_tokens": 30, "temperature": 1.5, "seed": 4}
        [whole] = engine.generate([[5, 6, 7]], **params)
        for cut in range(1, len(whole)):
            id = engine.add([5, 6, 7], **params)
            engine.inbox.commands[-1].request.resumed_ids = whole[:cut]
            assert [token for output in engine.run()[id] for token in output.token_ids] == whole[cut:]
        for given, code in ((whole, "output_complete"), ([0, 0], "invalid_request")):
            id = engine.add([5, 6, 7], **params)
            engine.inbox.commands[-1].request.resumed_ids = given
            [output] = engine.run()[id]
            assert output.error is not None
            assert (output.error.code, output.error.param) == (code, "resume_token_ids")
