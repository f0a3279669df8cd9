"""Schemas made by chance: with random weights, whatever is complete validates.

In the ordinary run a few; `make structured` takes 2,000, or as many as POWERBAND_STRUCTURED_CASES says.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from powerband import LLM, SamplingParams, StructuredOutputsParams
from powerband.errors import InvalidRequest
from powerband.structured.specification import grammar_of

CASES = int(os.environ.get("POWERBAND_STRUCTURED_CASES", "24"))
CHOICES = 4  # answers to each
BATCH = 16  # schemas or expressions that are answered at once
NAMES = st.sampled_from(["a", "b", "name", "x y", "é", 'q"'])
COUNTS = st.integers(0, 3)
PATTERNS = st.sampled_from(["^[a-c]+$", "a", r"^\d{2}$", r"\w", "^(x|yz)*$", r"[^\s]$"])
FORMATS = st.sampled_from(["date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "hostname", "duration", "uri"])


def some(fields: dict[str, Any], **fixed: Any) -> st.SearchStrategy[dict[str, Any]]:
    """An object with some of these fields."""
    return st.fixed_dictionaries({name: st.just(value) for name, value in fixed.items()}, optional=fields)


@st.composite
def objects(draw: Any, parts: st.SearchStrategy[Any]) -> dict[str, Any]:
    properties = draw(st.dictionaries(NAMES, parts, max_size=3))
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    schema["required"] = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    if draw(st.booleans()):
        schema["additionalProperties"] = draw(st.one_of(st.just(False), parts))
    return schema


NUMBERS = {
    "minimum": st.integers(-50, 5),
    "maximum": st.integers(5, 50),
    "exclusiveMinimum": st.integers(-50, 4),
    "multipleOf": st.sampled_from([1, 2, 3, 5]),
}
LEAVES: st.SearchStrategy[Any] = st.one_of(
    st.booleans().filter(bool),
    some({"minLength": COUNTS, "maxLength": st.integers(3, 8), "pattern": PATTERNS}, type="string"),
    some({}, type="string").flatmap(lambda schema: FORMATS.map(lambda name: {**schema, "format": name})),
    some(NUMBERS, type="integer"),
    some(NUMBERS, type="number"),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": {"a": [1, "x"]}}, {"enum": [1, "1", None, [2]]}]),
    st.sampled_from([{"type": ["string", "null"], "maxLength": 3}, {"type": ["integer", "boolean"]}]),
)
SCHEMAS: st.SearchStrategy[Any] = st.recursive(
    LEAVES,
    lambda parts: st.one_of(
        objects(parts),
        some({"items": parts, "minItems": COUNTS, "maxItems": st.integers(3, 5)}, type="array"),
        st.lists(parts, min_size=1, max_size=3).map(lambda items: {"type": "array", "prefixItems": items}),
        st.lists(parts, min_size=1, max_size=3).map(lambda items: {"anyOf": items}),
        st.lists(parts, min_size=1, max_size=2).map(lambda items: {"allOf": items}),
        parts.map(lambda part: {"$defs": {"p": part}, "type": "object", "properties": {"r": {"$ref": "#/$defs/p"}}}),
    ),
    max_leaves=6,
)


def any_schema(depth: int) -> st.SearchStrategy[Any]:
    """Keywords in any combination: most of it is a contradiction, or cannot be enforced."""
    kinds = st.sampled_from(["array", "boolean", "integer", "null", "number", "object", "string"])
    fields: dict[str, st.SearchStrategy[Any]] = {
        "type": kinds | st.lists(kinds, min_size=1, max_size=3, unique=True),
        **dict.fromkeys(("minimum", "exclusiveMaximum"), st.integers(-9, 9)),
        **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), COUNTS),
        **{"multipleOf": st.sampled_from([1, 2, 0.5]), "pattern": PATTERNS, "uniqueItems": st.booleans()},
        **{"const": st.sampled_from(["x", 1, None, [True]]), "enum": st.lists(st.integers(0, 3) | st.text(max_size=2))},
        "required": st.lists(st.sampled_from(["a", "b"]), unique=True),
    }
    if depth:
        inner = any_schema(depth - 1)
        several = st.lists(inner, min_size=1, max_size=2)
        fields |= {"properties": st.dictionaries(st.sampled_from(["a", "b"]), inner), "items": inner, "oneOf": several}
        fields |= {"prefixItems": several, "anyOf": several, "allOf": several, "additionalProperties": inner}
        fields |= {"patternProperties": st.dictionaries(st.sampled_from(["^a", "b"]), inner), "not": inner}
    chosen = st.lists(st.sampled_from(sorted(fields)), max_size=4, unique=True)
    return chosen.flatmap(lambda names: st.fixed_dictionaries({name: fields[name] for name in names}))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    seqs = BATCH * CHOICES
    tiny: dict[str, Any] = {"max_num_seqs": seqs, "max_model_len": 128, "kv_cache_memory": "64MiB", "threads": 1}
    with LLM("demo", load_format="dummy", dtype="float32", device="cpu", **tiny) as llm:
        yield llm


def made(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """The same ones every time."""
    found: list[Any] = []

    @seed(7)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found


def answers(llm: LLM, grammars: list[str], **params: Any) -> Iterator[list[Any]]:
    """To each grammar its answers."""
    for start in range(0, len(grammars), BATCH):
        asked = [
            SamplingParams(temperature=2, seed=1, n=CHOICES, grammar=grammar, **params)
            for grammar in grammars[start : start + BATCH]
        ]
        for result in llm.generate(["x"] * len(asked), asked, use_tqdm=False):
            yield result.outputs


@pytest.mark.parametrize(("schemas", "share"), [(SCHEMAS, 0.75), (any_schema(2), 0.25)], ids=["built", "any-keywords"])
def test_every_complete_answer_validates(llm: LLM, schemas: st.SearchStrategy[Any], share: float) -> None:
    """A refusal names a place."""
    tokens = llm._engine.grammars.tokens
    taken: list[tuple[Any, str]] = []
    refused: list[InvalidRequest] = []
    for schema in made(schemas, max(int(CASES * share), 1)):
        try:
            form = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
            taken.append((schema, grammar_of(form, tokens)))
        except InvalidRequest as error:
            refused.append(error)
    ends = {id: 5.0 for text in ('"', "}", "]") for id in llm.get_tokenizer().encode(text)}  # or few would end
    kind = jsonschema.Draft202012Validator
    reasons: Counter[str] = Counter()
    every = answers(llm, [grammar for _, grammar in taken], max_tokens=48, logit_bias=ends)
    for (schema, _), outputs in zip(taken, every, strict=True):
        for output in outputs:
            reasons[output.finish_reason] += 1
            assert output.finish_reason in ("stop", "length"), (schema, output)
            if output.finish_reason == "stop":
                kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(output.text))
    print(f"{reasons['stop']} complete, {reasons['length']} cut off, {len(refused)} schemas refused")
    assert reasons["stop"] > 0
    assert all((error.param or "").startswith("structured_outputs.json") for error in refused)


REGEXES = st.recursive(
    st.sampled_from(["a", "b1", r"\d", r"\w", "[x-z_]", r"\s", "[^a]", r"\.", "é", "."]),
    lambda parts: st.one_of(
        st.lists(parts, min_size=2, max_size=3).map("".join),
        st.lists(parts, min_size=2, max_size=3).map(lambda some: f"({'|'.join(some)})"),
        st.tuples(parts, st.sampled_from(["?", "*", "+", "{2}", "{1,3}"])).map(lambda pair: f"({pair[0]}){pair[1]}"),
    ),
    max_leaves=5,
)


def test_every_complete_answer_matches_its_regular_expression(llm: LLM) -> None:
    tokens = llm._engine.grammars.tokens
    patterns = made(REGEXES, CASES)
    grammars = [grammar_of(StructuredOutputsParams(regex=pattern), tokens) for pattern in patterns]
    for pattern, outputs in zip(patterns, answers(llm, grammars, max_tokens=20), strict=True):
        for output in outputs:
            assert output.finish_reason in ("stop", "length"), (pattern, output)
            assert output.finish_reason == "length" or re.fullmatch(pattern, output.text), (pattern, output.text)
