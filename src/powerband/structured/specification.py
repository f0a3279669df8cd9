"""From what a request asks of its answer's form to one grammar of llguidance.

Converting hostile specifications may take long: strangers' come here in a worker process (compiler.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from powerband.core.structured_outputs import MAX_SPECIFICATION_BYTES, StructuredOutputsParams
from powerband.errors import InvalidRequest
from powerband.structured.compiled import compile_grammar
from powerband.structured.finite import endless_place
from powerband.structured.json_schema import SchemaReader, children
from powerband.structured.regex import portable
from powerband.structured.structural_tag import StructuralTag
from powerband.structured.trial import check_repeats, follow

# Between the parts of JSON. A bound, since a model that has lost its way writes blank lines until it is cut off.
_WHITESPACE = r"[ \t]{1,2}|\r?\n[ \t]{0,40}"
# No \u: with it, an answer could name a property twice, in two spellings.
_ESCAPES = 'nrbtf\\"'

Places = Mapping[str, str]  # what errors call the fields of StructuredOutputsParams, where not by their names


def grammar_of(outputs: StructuredOutputsParams, tokens: LLTokenizer, places: Places | None = None) -> str:
    """One grammar for `Grammars`, which has been compiled once. Raises InvalidRequest naming the place."""
    place = (places or {}).get(outputs.kind, f"structured_outputs.{outputs.kind}")
    value = getattr(outputs, outputs.kind)
    try:
        size = len(value if isinstance(value, str) else json.dumps(value))
    except (RecursionError, TypeError, ValueError) as error:
        raise _bad(place, f"it cannot be written as JSON: {error}") from error
    if size > MAX_SPECIFICATION_BYTES:
        raise InvalidRequest(f"'{place}' has {size} characters; the limit is {MAX_SPECIFICATION_BYTES}.", param=place)
    if outputs.kind in ("json", "json_object"):
        return _json_grammar({"type": "object"} if outputs.kind == "json_object" else value, outputs, tokens, place)
    if outputs.kind == "structural_tag":
        grammar = _tag_grammar(value, outputs, place)
    else:
        grammar = _MAKERS[outputs.kind](value, place)
    try:
        if outputs.kind in ("regex", "grammar"):
            check_repeats(value)
        follow(compile_grammar(tokens, grammar))
    except InvalidRequest as error:
        raise _bad(place, _why(error)) from error
    return grammar


def _json_options(outputs: StructuredOutputsParams) -> dict[str, Any]:
    """How llguidance compiles a schema."""
    options: dict[str, Any] = {
        "whitespace_flexible": not outputs.disable_any_whitespace,
        "json_allowed_escapes": _ESCAPES,
        "lenient": False,
        "coerce_one_of": False,
    }
    if not outputs.disable_any_whitespace:
        options["whitespace_pattern"] = outputs.whitespace_pattern or _WHITESPACE
    return options


def json_text(schema: Any, outputs: StructuredOutputsParams) -> str:
    """The grammar of a schema that was read."""
    return json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": _json_options(outputs)}}]})


def read_schema(schema: Any, outputs: StructuredOutputsParams, place: str) -> dict[str, Any]:
    """A schema as an object in the form that can be compiled. Raises InvalidRequest naming the place."""
    read = SchemaReader(place, closed=outputs.disable_additional_properties).read(schema)
    if isinstance(read, bool):
        if not read:
            raise _bad(place, "nothing satisfies it")
        read = {}
    endless = endless_place(read)
    if endless is not None:
        raise _bad(".".join((place, *endless)), "nothing satisfies it: it contains itself without end")
    checked: dict[str, Any] = read
    return checked


def _tag_grammar(tag: Any, outputs: StructuredOutputsParams, place: str) -> str:
    def json_rule(schema: Any, at: str) -> str:
        return "%json " + json.dumps({**read_schema(schema, outputs, at), "x-guidance": _json_options(outputs)})

    return StructuralTag(place, json_rule).write(_parsed(tag, place) if isinstance(tag, str) else tag)


def _json_grammar(schema: Any, outputs: StructuredOutputsParams, tokens: LLTokenizer, place: str) -> str:
    if isinstance(schema, str):
        schema = _parsed(schema, place)
    read = read_schema(schema, outputs, place)
    grammar = json_text(read, outputs)
    try:
        matcher = compile_grammar(tokens, grammar)
    except InvalidRequest as error:
        path, why = _locate(read, read, outputs, tokens, _why(error))
        raise _bad(".".join((place, *path)), why) from error
    try:
        follow(matcher)
    except InvalidRequest as error:
        raise _bad(place, _why(error)) from error
    return grammar


def _locate(
    schema: Any, root: Any, outputs: StructuredOutputsParams, tokens: LLTokenizer, why: str
) -> tuple[tuple[str, ...], str]:
    """The place of the smallest part of a schema that cannot be compiled for the same reason."""
    definitions = {name: root[name] for name in ("$defs", "definitions") if isinstance(root, dict) and name in root}
    for path, child in children(schema):
        if isinstance(child, bool):
            continue
        alone = {**definitions, **child}
        try:
            compile_grammar(tokens, json_text(alone, outputs))
        except InvalidRequest as error:
            if _why(error) == why:
                deeper, found = _locate(child, root, outputs, tokens, why)
                return (*path, *deeper), found
    return (), why


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad(place, f"it is not JSON: {str(error)[:200]}") from error


def _regex_grammar(pattern: str, place: str) -> str:  # noqa: ARG001 (one signature for all)
    made: str = LLMatcher.grammar_from_regex(portable(pattern))
    return made


def _choice_grammar(choices: list[str], place: str) -> str:  # noqa: ARG001 (one signature for all)
    return "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, choices))  # a terminal: thousands are fast, too


def _free_grammar(text: str, place: str) -> str:
    """Lark's syntax as it is, GBNF in Lark's."""
    if text.lstrip().startswith("{"):  # the library's own JSON, which could switch off what is promised
        raise _bad(place, "it is neither Lark nor GBNF")
    if "::=" not in text:
        return text
    try:
        made: str = any_to_lark(text)
    except Exception as error:  # the converter raises whatever Python raises
        raise _bad(place, f"it is neither Lark nor GBNF: {str(error)[:200]}") from error
    return made


_MAKERS: dict[str, Callable[[Any, str], str]] = {
    "regex": _regex_grammar,
    "choice": _choice_grammar,
    "grammar": _free_grammar,
}


def _why(error: InvalidRequest) -> str:
    if "oneOf constraints are not supported" in error.message:
        return "a value may satisfy two schemas of its oneOf, which cannot be enforced; use anyOf"
    return error.message.split(": ", 1)[-1].rstrip(".")


def _bad(place: str, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"'{place[:400]}' cannot be used: {why[:500]}.",
        hint="docs/structured-output.md says what is supported.",
        param=place[:400],
        code="invalid_grammar",
    )
