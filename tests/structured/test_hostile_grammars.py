"""Hostile specifications: each is refused, or compiled and followed, within a second, and takes nothing else along."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from powerband.core.structured_outputs import StructuredOutputsParams
from powerband.errors import InvalidRequest
from powerband.structured.compiler import GrammarCompiler
from powerband.structured.finite import endless_place
from powerband.structured.json_schema import SchemaReader
from powerband.text.tokenizer import Tokenizer
from powerband.worker_process import WorkerLimits

DEMO = "src/powerband/demo"


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def doubling(depth: int, keyword: str) -> Any:
    """Each definition has the next one twice."""
    parts = {f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(depth)}
    last = {"type": "object", "properties": {"a": {"type": "string"}}}
    return {"$defs": {**parts, f"d{depth}": last}, "$ref": "#/$defs/d0"}


CROSSED = {"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {"type": "string"}}} for j in range(6)]} for i in range(8)]}
PATTERNS = {f"^{chr(97 + i % 26)}{i}[a-z]*$": {"pattern": "^(a|b)*a(a|b){12}$"} for i in range(300)}
# What must be refused: by its size, by what it takes to compile, or by what it takes to follow.
REFUSED: dict[str, dict[str, Any]] = {
    "many required": {"json": {"type": "object", "required": [f"p{i}" for i in range(15_000)]}},
    "many alternatives of many": {"json": CROSSED},
    "patterns that may overlap": {"json": {"type": "object", "patternProperties": PATTERNS}},
    "nested 400 deep": {"json": nested(400)},
    "nested 3000 deep, as text": {"json": json.dumps(1).join(['{"items":' * 3000, "}" * 3000])},
    "repeated a thousand million times": {"regex": "a{1000000000}"},
    "repeated a million times": {"regex": "(abc){1000000}"},
    "repeated in repeated": {"regex": "(((((a{1,50}){1,50}){1,50}){1,50}){1,50}){1,50}"},
    "repeated after a harmless start": {"regex": "[a-z]{200}(abc){100000}"},
    "a pattern in a schema": {"json": {"items": {"pattern": "(ab){99999}"}}},
    "30,000 parentheses": {"regex": "(" * 30_000 + ")" * 30_000},
    "too large": {"regex": "a" * 300_000},
    "a large prime": {"json": {"type": "integer", "multipleOf": 999_999_937}},
    "intersections": {"grammar": "start: A\nA: " + " & ".join(f"/(.*{chr(97 + i)}){{3}}.*/" for i in range(12))},
    "grammar with a large repetition": {"grammar": 'start: "abc"{1000000}'},
    "neither Lark nor GBNF": {"grammar": "::= ((("},
    "a lookaround": {"regex": "(?=a)b"},
    "a backreference": {"regex": r"(a)\1"},
}
# What is bounded by construction.
HARMLESS: dict[str, dict[str, Any]] = {
    "catastrophic for a backtracking engine": {"regex": "(a+)+b"},
    "another one": {"regex": "(x+x+)+y"},
    "exponential as an automaton": {"regex": "(a|b)*a(a|b){12}"},
    "a long string": {"json": {"type": "string", "minLength": 10_000_000}},
    "a long array": {"json": {"type": "array", "minItems": 1_000_000, "items": {"type": "string"}}},
    "definitions that double": {"json": doubling(18, "allOf")},
    "alternatives that double": {"json": doubling(30, "anyOf")},
    "an ambiguous grammar": {"grammar": 'start: s\ns: s s | s s s | "a"'},
    "left recursion": {"grammar": 'start: start "a" | "a"'},
    "8,000 values": {"json": {"enum": [f"value {i}" for i in range(8000)]}},
    "a loop over nothing": {"regex": "(a*)*b"},
}


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    tokenizer = Tokenizer.load(DEMO)
    assert tokenizer is not None
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, [0, 2])
    yield compiler
    compiler.close()


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_specification_is_refused_and_the_next_one_is_served(compiler: GrammarCompiler, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        compiler.grammar(StructuredOutputsParams(**REFUSED[name]))
    assert (caught.value.param or "").startswith("structured_outputs.")
    assert len(caught.value.message) < 1000
    assert compiler.grammar(StructuredOutputsParams(regex=f"a{{{len(name)}}}"))


@pytest.mark.parametrize("name", HARMLESS)
def test_what_looks_hostile_and_is_bounded_is_served(compiler: GrammarCompiler, name: str) -> None:
    assert compiler.grammar(StructuredOutputsParams(**HARMLESS[name]))


def test_a_worker_that_takes_too_long_is_ended_and_others_are_served_meanwhile() -> None:
    tokenizer = Tokenizer.load(DEMO)
    assert tokenizer is not None
    compiler = GrammarCompiler(tokenizer, 4096, [0], WorkerLimits(seconds=0.3, max_workers=1))
    try:
        compiler.grammar(StructuredOutputsParams(regex="a"))
        began_s = time.monotonic()
        with pytest.raises(InvalidRequest, match=r"took more than 0\.3 s of CPU time or too much memory") as caught:
            compiler.grammar(StructuredOutputsParams(json={"type": "object", "patternProperties": PATTERNS}))
        assert caught.value.code == "grammar_limit"
        assert time.monotonic() - began_s < 30
        assert compiler.grammar(StructuredOutputsParams(regex="b"))
    finally:
        compiler.close()


def chain(length: int) -> dict[str, Any]:
    """Each definition needs the next one."""
    parts = {f"d{i}": nested_in(f"#/$defs/d{i + 1}") for i in range(length)}
    return {"$defs": {**parts, f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def nested_in(reference: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": {"$ref": reference}}, "required": ["a"]}


def unions(count: int) -> dict[str, Any]:
    """Many unions of objects with many constants."""
    wide = {"type": "object", "properties": {f"k{i}": {"const": "x"} for i in range(count)}}
    union = {"oneOf": [{"$ref": "#/$defs/wide"}, {"$ref": "#/$defs/wide"}]}
    return {"$defs": {"wide": wide}, "properties": {f"p{i}": union for i in range(count)}}


@pytest.mark.parametrize("schema_of", [chain, unions])
def test_schemas_are_read_in_linear_time(schema_of: Callable[[int], dict[str, Any]]) -> None:
    def count(length: int) -> int:
        """Of function calls, which does not depend on the machine."""
        calls = 0

        def count_call(*_: Any) -> None:
            nonlocal calls
            calls += 1

        sys.setprofile(count_call)
        try:
            endless_place(SchemaReader("json").read(schema_of(length)))
        finally:
            sys.setprofile(None)
        return calls

    assert count(400) < 3 * count(200)


def test_results_and_refusals_are_kept_by_content(compiler: GrammarCompiler) -> None:
    form = StructuredOutputsParams(json={"type": "object", "properties": {"kept": {"type": "integer"}}})
    first = compiler.grammar(form)
    compiler._pool.close()
    assert compiler.grammar(form) == first
