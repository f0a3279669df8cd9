"""Regular expressions, choices, grammars and structural tags: what they accept."""

from __future__ import annotations

import re
from typing import Any

import pytest
from grammars_for_tests import accepts, grammar
from hypothesis import given, settings
from hypothesis import strategies as st

from powerband.core.structured_outputs import MAX_CHOICES
from powerband.errors import InvalidRequest
from powerband.structured.regex import portable
from powerband.structured.structural_tag import MAX_DEPTH

CLASSES = [r"\w", r"\W", r"\d", r"\D", r"\s", r"\S", r"[\w-]", r"[^\w]", r"[^\W]", r"[\S]", r"[^\s]", r"[\Dx]", r"[]a]"]


@pytest.mark.parametrize("pattern", CLASSES)
def test_what_a_class_accepts_python_matches_too(pattern: str) -> None:
    made = grammar(regex=pattern)
    chars = [chr(code) for code in (*range(0x100), 0x2B0, 0x660, 0x1680, 0x2028, 0x3000, 0x4E2D, 0xFEFF, 0x1D7CE)]
    accepted = [char for char in chars if accepts(made, char)]
    assert accepted
    assert all(re.fullmatch(pattern, char) for char in accepted)
    assert {char for char in chars if char.isascii() and char > "\x20" and re.fullmatch(pattern, char)} <= set(accepted)


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
@pytest.mark.parametrize(
    ("pattern", "text", "is_match"),
    [
        ("^ab$", "ab", True),
        (r"\Aab\Z", "ab", True),
        ("a/b", "a/b", True),
        ("[[a]", "[", True),
        ("[a&&b]", "&", True),
        ("(?i)ab", "AB", True),
        ("a.c", "a\nc", False),
        ("(?P<x>a)b", "ab", True),
        ("a{2,3}?", "aaa", True),
        ("日本+", "日本本", True),
        ("^a|b$", "ac", False),
    ],
)
def test_regular_expressions_mean_what_they_mean_in_python(pattern: str, text: str, is_match: bool) -> None:
    assert bool(re.fullmatch(pattern, text)) is is_match
    assert accepts(grammar(regex=pattern), text) is is_match


@settings(max_examples=60, derandomize=True)
@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=5, unique=True), st.text(max_size=12))
def test_choices_are_accepted_and_nothing_else(choices: list[str], other: str) -> None:
    choices = [text.encode(errors="ignore").decode() or "x" for text in choices]
    made = grammar(choice=choices)
    assert all(accepts(made, text) for text in choices)
    assert accepts(made, other.encode(errors="ignore").decode()) is (other.encode(errors="ignore").decode() in choices)


@pytest.mark.parametrize("beginning", ["", "all of them begin with the same words, and there are many " * 4])
def test_as_many_choices_as_the_limit_allows_are_taken(beginning: str) -> None:
    choices = [f"{beginning[: 200_000 // MAX_CHOICES]}{number}" for number in range(MAX_CHOICES)]
    made = grammar(choice=choices)
    assert accepts(made, choices[-1])
    assert not accepts(made, choices[-1] + "0")


def test_grammars_are_lark_or_gbnf() -> None:
    for text in (
        'start: "a" DIGIT+\nDIGIT: /[0-9]/',
        '?start: "a" digits\n?digits: DIGIT | digits DIGIT\nDIGIT: /[0-9]/',
        'root ::= "a" digit+\ndigit ::= [0-9]',
    ):
        made = grammar(grammar=text)
        assert accepts(made, "a12")
        assert not accepts(made, "a")
    with pytest.raises(InvalidRequest, match="neither Lark nor GBNF"):
        grammar(grammar='{"grammars": [{"json_schema": {"x-guidance": {"lenient": true}, "not": {}}}]}')


CALL = {"begin": "<f=add>", "schema": {"type": "object", "properties": {"x": {"type": "integer"}}}, "end": "</f>"}
OLD = {"type": "structural_tag", "structures": [CALL], "triggers": ["<f="]}
NUMBER: dict[str, Any] = {"type": "json_schema", "json_schema": {"type": "integer"}}
TAG: dict[str, Any] = {"type": "tag", "begin": "<n>", "content": NUMBER, "end": "</n>"}


def tagged(format: dict[str, Any]) -> str:
    return grammar(structural_tag={"type": "structural_tag", "format": format})


def test_text_is_free_until_a_trigger_and_constrained_after_it() -> None:
    made = grammar(structural_tag=OLD)
    for text in ("", "any text < here", 'so <f=add>{"x": 1}</f> and <f=add>{}</f>.'):
        assert accepts(made, text), text
    for text in ("so <f=sub>", 'so <f=add>{"x": "1"}</f>', 'so <f=add>{"x": 1} and'):
        assert not accepts(made, text), text


@pytest.mark.parametrize(
    ("format", "accepted", "refused"),
    [
        (TAG, ["<n>12</n>"], ["<n>a</n>", "<n>1</n> "]),
        ({"type": "const_string", "value": "a b"}, ["a b"], ["a"]),
        ({"type": "regex", "pattern": "[a/]+"}, ["a/a"], ["b"]),
        ({"type": "regex", "pattern": r"https?:\/\/\\/x"}, ["https://\\/x"], ["https:\\/\\/"]),
        ({"type": "any_text"}, ["", "x\ny"], []),
        ({"type": "or", "elements": [TAG, {"type": "const_string", "value": "no"}]}, ["no", "<n>1</n>"], ["n"]),
        ({"type": "sequence", "elements": [TAG, TAG]}, ["<n>1</n><n>2</n>"], ["<n>1</n>"]),
        (
            {"type": "tag", "begin": "<t>", "content": {"type": "any_text"}, "end": "</t>"},
            ["<t>a<b</t>"],
            ["<t>", "<t></t>x"],
        ),
        ({"type": "triggered_tags", "triggers": ["<n"], "tags": [TAG], "at_least_one": True}, ["a<n>1</n>b"], ["a"]),
        (
            {"type": "tags_with_separator", "tags": [TAG], "separator": ", ", "at_least_one": True},
            ["<n>1</n>", "<n>1</n>, <n>2</n>"],
            ["", "<n>1</n><n>2</n>"],
        ),
    ],
)
def test_formats_of_structural_tags(format: dict[str, Any], accepted: list[str], refused: list[str]) -> None:
    made = tagged(format)
    assert all(accepts(made, text) for text in accepted)
    assert not any(accepts(made, text) for text in refused)


@pytest.mark.parametrize(
    ("tag", "place"),
    [
        ({"format": {"type": "poem"}}, "format.type"),
        ({"format": {"type": "tag", "begin": "", "content": NUMBER, "end": ""}}, "format.begin"),
        ({"format": {"type": "json_schema", "json_schema": {"not": {}}}}, "format.json_schema.not"),
        ({"structures": [CALL], "triggers": ["<g"]}, "structures.tags.0.begin"),
        ({}, "format"),
    ],
)
def test_a_structural_tag_that_cannot_be_followed_is_refused_with_its_place(tag: dict[str, Any], place: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        grammar(structural_tag={"type": "structural_tag", **tag})
    assert caught.value.param == f"structured_outputs.structural_tag.{place}"


def test_structural_tags_are_nested_to_a_limit() -> None:
    format: dict[str, Any] = TAG
    for _ in range(MAX_DEPTH + 1):
        format = {"type": "sequence", "elements": [format]}
    with pytest.raises(InvalidRequest, match="nested more than"):
        tagged(format)


def test_rewriting_takes_linear_time_and_leaves_plain_patterns() -> None:
    assert portable(r"a\.b\\w[x\]y]+") == r"a\.b\\w[x\]y]+"
    assert len(portable("[" * 100_000)) <= 200_000
