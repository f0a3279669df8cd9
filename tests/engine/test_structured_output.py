"""Answers of a form: with random weights and a high temperature, whatever is complete has the form that was asked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from powerband import LLM, SamplingParams, StructuredOutputsParams
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
    asked = SamplingParams(**{"temperature": 2.0, "max_tokens": 200, "seed": 1, "structured_outputs": form, **params})
    results = llm.generate(prompts or ["The list is"], asked, use_tqdm=False)
    return [output for result in results for output in result.outputs]


def test_json_validates(llm: LLM) -> None:
    made = answers(llm, StructuredOutputsParams(json=PERSON), n=16)
    complete = [output for output in made if output.finish_reason == "stop"]
    assert len(complete) > 8
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
