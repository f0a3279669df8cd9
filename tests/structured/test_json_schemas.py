"""JSON Schemas: what they forbid cannot be written, and what cannot be enforced is refused with its place.

The cases are of the JSON Schema Test Suite (https://github.com/json-schema-org/JSON-Schema-Test-Suite), whose licence
lies beside them.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from grammars_for_tests import accepts, grammar

from powerband.errors import InvalidRequest

SUITE = json.loads(gzip.decompress(Path(__file__).with_name("json_schema_test_suite.json.gz").read_bytes()))
# Answers are written in one way where JSON has several: properties in the schema's order, numbers as in the schema,
# formats in their usual spelling. In all but these files, everything that is valid can be written.
ONE_SPELLING = ("allOf", "const", "enum", "type", "format", "email", "ipv6", "date-time", "time", "ecmascript-regex")


def text_of(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def test_nothing_invalid_can_be_written_and_most_that_is_valid_can() -> None:
    counts: Counter[str] = Counter()
    for case in SUITE:
        try:
            made = grammar(json=case["schema"])
        except InvalidRequest as error:
            counts["refused" if (error.param or "").startswith("structured_outputs.json") else "no place"] += 1
            continue
        for description, value, is_valid in case["tests"]:
            is_accepted = accepts(made, text_of(value))
            assert is_valid or not is_accepted, f"{case['from']}: {case['description']}: {description}"
            counts[f"valid {is_accepted}" if is_valid else "invalid"] += 1
    assert counts["no place"] == 0
    assert counts["invalid"] > 500
    assert counts["valid True"] > 10 * counts["valid False"]
    assert counts["refused"] < 0.5 * len(SUITE)


def refusal(schema: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        grammar(json=schema)
    return caught.value


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"uniqueItems": True}, "uniqueItems"),
        ({"properties": {"a": {"items": {"not": {"type": "string"}}}}}, "properties.a.items.not"),
        ({"anyOf": [{}, {"contains": {}}]}, "anyOf.1.contains"),
        ({"$defs": {"x": {"if": {}, "then": {"minimum": 1}}}, "$ref": "#/$defs/x"}, "$defs.x.if"),
        ({"items": {"$ref": "https://example.com/schema.json"}}, "items.$ref"),
        ({"items": {"format": "idn-email"}}, "items.format"),
        ({"items": {"type": "foo"}}, "items"),
        ({"items": [1]}, "prefixItems.0"),
        ({"properties": {"a": {"properties": []}}}, "properties.a.properties"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "x-guidance"),
        ({"properties": {"a": {"oneOf": [{"type": "string"}, {"minLength": 2}]}}}, "properties.a"),
        ({"properties": {"a": {"type": "string", "pattern": "(?=a)b"}}}, "properties.a"),
        ({"type": "object", "minProperties": 3}, "minProperties"),
        ({"minLength": -1}, "minLength"),
        ({"const": "\x00"}, "const"),
    ],
)
def test_what_cannot_be_enforced_is_refused_with_its_place(schema: Any, place: str) -> None:
    assert refusal(schema).param == f"structured_outputs.json.{place}"


@pytest.mark.parametrize(
    "schema",
    [
        False,
        {"enum": []},
        {"type": "integer", "minimum": 3, "maximum": 2},
        {"allOf": [{"type": "string"}, {"type": "number"}]},
        {"type": "object", "properties": {"a": False}, "required": ["a"]},
        {"type": "array", "items": False, "minItems": 1},
        {"$ref": "#"},
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    ],
)
def test_a_contradiction_is_refused(schema: Any) -> None:
    error = refusal(schema)
    assert (error.code, (error.param or "")[:23]) == ("invalid_grammar", "structured_outputs.json")


def test_a_schema_that_contains_itself_is_followed() -> None:
    tree = {
        "type": "object",
        "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["value", "next"],
        "additionalProperties": False,
    }
    made = grammar(json=tree)
    assert accepts(made, '{"value":1,"next":{"value":2,"next":null}}')
    assert not accepts(made, '{"value":1,"next":{"value":2}}')


def variant(kind: Any, required: list[str], **field: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"kind": kind, **field},
        "required": required,
        "additionalProperties": False,
    }


# As pydantic writes a union with a discriminator, whose default makes it a property that is not required.
UNION: dict[str, Any] = {
    "$defs": {
        "Cat": variant({"const": "cat", "default": "cat", "type": "string"}, ["lives"], lives={"type": "integer"}),
        "Dog": variant({"enum": ["dog", "wolf"], "type": "string"}, ["kind"], name={"type": "string"}),
    },
    "discriminator": {"propertyName": "kind", "mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"}},
    "oneOf": [{"$ref": "#/$defs/Cat"}, {"allOf": [{"$ref": "#/$defs/Dog"}]}, {"type": "null"}],
}


def test_a_union_with_a_discriminator_is_enforced() -> None:
    made = grammar(json=UNION)
    for text in ('{"kind":"cat","lives":9}', '{"kind":"wolf","name":"x"}', '{"kind":"dog"}', "null"):
        jsonschema.validate(json.loads(text), UNION)
        assert accepts(made, text), text
    for text in ('{"kind":"cat","name":"x"}', '{"kind":"cow"}', '{"kind":"cat"}', "{}", "1"):
        assert not accepts(made, text), text


@pytest.mark.parametrize(
    "choices",
    [
        [{"type": "number"}, {"type": "integer"}],
        [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}],
        [{"properties": {"k": {"const": 1}}}, {"properties": {"k": {"const": 2}}}],  # a text satisfies both
        [{"type": "object", "properties": {"k": {"const": "a"}}}, {"type": "object"}],
    ],
)
def test_one_of_schemas_that_do_not_exclude_each_other_is_refused(choices: list[Any]) -> None:
    schema = {"$defs": {"a": {"type": "object", "properties": {"k": {"const": "a"}}}}, "items": {"oneOf": choices}}
    error = refusal(schema)
    assert error.param == "structured_outputs.json.items"
    assert "use anyOf" in error.message


def test_pydantics_pattern_for_decimals_is_enforced() -> None:
    schema = {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}
    made = grammar(json=schema)
    for text in ("1", "-0.5", "+00012.", ".5", "-", ".", "", "+.", "1.2.3", "x"):
        assert accepts(made, json.dumps(text)) is bool(re.search(schema["pattern"], text)), text


ZOD_EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"


@pytest.mark.parametrize("pattern", [ZOD_EMAIL, ZOD_EMAIL.replace(r"\-\.", r"\-.").replace(r"9\-]*\.", r"9-]*\.")])
def test_zods_pattern_for_emails_is_enforced(pattern: str) -> None:
    made = grammar(json={"type": "string", "pattern": pattern})
    locals_ = ("a", "a.b", "o'k", "o'", "a..b", ".a", "a.", "-", "a+b_c-d", "", "a.'b", "'.a")
    domains = ("x.de", "x", "x.y.com", "-x.de", "x-.de", "x..de", "x.d")
    texts = [f"{local}@{domain}" for local in locals_ for domain in domains]
    assert {text for text in texts if accepts(made, json.dumps(text))} == set(filter(re.compile(pattern).search, texts))


def test_what_asks_for_nothing_is_no_error() -> None:
    plain = {
        **{"title": "T", "description": "d", "default": 1, "examples": [1], "$comment": "c", "deprecated": True},
        **{
            "uniqueItems": False,
            "unevaluatedProperties": True,
            "dependentRequired": {},
            "then": False,
            "maxContains": 1,
        },
        **{
            "propertyNames": {"type": "string"},
            "format": "int32",
            "x-of-others": {"not": 1},
            "contentEncoding": "base64",
        },
    }
    assert accepts(grammar(json={**plain, "type": "integer"}), "1")
    assert accepts(grammar(json={"if": {"type": "string"}, "type": "integer"}), "1")


def test_a_property_cannot_be_written_twice_in_two_spellings() -> None:
    made = grammar(json={"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}})
    assert accepts(made, '{"a":1,"b":"x"}')
    assert not accepts(made, '{"a":1,"a":"x"}')
    assert not accepts(made, '{"a":1,"\\u0061":"x"}')


def test_keywords_of_older_drafts_mean_what_they_meant() -> None:
    assert not accepts(grammar(json={"type": "integer", "minimum": 3, "exclusiveMinimum": True}), "3")
    pair = grammar(json={"type": "array", "items": [{"type": "string"}, {"type": "integer"}], "additionalItems": False})
    assert accepts(pair, '["a",1]')
    assert not accepts(pair, '["a",1,2]')


@pytest.mark.parametrize("day", ["2024-02-29", "2000-02-29", "0001-01-01", "9999-12-31", "2023-11-30"])
def test_dates_that_there_are_can_be_written(day: str) -> None:
    assert accepts(grammar(json={"type": "string", "format": "date"}), f'"{day}"')


@pytest.mark.parametrize("day", ["2023-02-29", "1900-02-29", "0000-01-01", "2023-11-31", "2023-13-01", "2023-02-30"])
def test_dates_that_there_are_not_cannot(day: str) -> None:
    assert not accepts(grammar(json={"type": "string", "format": "date"}), f'"{day}"')


def test_white_space_is_bounded_left_out_or_as_asked() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    indented = json.dumps({"a": 1}, indent=8)
    assert accepts(grammar(json=schema), indented)
    assert not accepts(grammar(json=schema), '{\n\n\n"a":1}')
    assert not accepts(grammar(json=schema, disable_any_whitespace=True), indented)
    assert accepts(grammar(json=schema, disable_any_whitespace=True), '{"a":1}')
    assert accepts(grammar(json=schema, whitespace_pattern="~"), '{~"a"~:1}')


def test_objects_are_closed_where_that_is_asked() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {}}}}}
    for closed in (False, True):
        made = grammar(json=schema, disable_additional_properties=closed)
        assert accepts(made, '{"a":{"b":1,"c":1}}') is not closed
        assert accepts(made, '{"a":{"b":1}}')
