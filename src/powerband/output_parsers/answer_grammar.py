"""The grammar of a chat's answer: calls by the schemas of their tools, and what is no call in the form asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec

from powerband.core.structured_outputs import StructuredOutputsParams
from powerband.errors import InvalidRequest
from powerband.output_parsers.formats import OutputFormat
from powerband.output_parsers.grammar import CallableTool, CallRules, check_size
from powerband.structured.finite import endless_place
from powerband.structured.json_schema import SchemaReader

_ANY_OBJECT = {"type": "object"}
# Compiles a form; the mapping has what errors call its fields.
Compile = Callable[[StructuredOutputsParams, dict[str, str]], str]


def answer_grammar(
    format: OutputFormat,
    prompt: str,
    rules: CallRules | None,
    form: str,
    token_id: Callable[[str], int | None],
    compile_form: Compile,
) -> str:
    """form: the grammar of structured output; "": any text. Returns "" where nothing has to be constrained.

    Schemas of tools that are not strict are left out where they cannot be enforced: their arguments are any object.
    May take as long as compiling does. Raises InvalidRequest naming the place.
    """
    if rules is None and not (form and format.reasoning):
        return form
    place = {"grammar": "response_format" if rules is None else "tools"}

    def compiled(rules: CallRules | None) -> str:
        return compile_form(StructuredOutputsParams(grammar=format.grammar(prompt, rules, token_id, form)), place)

    try:
        return compiled(None if rules is None else with_enforced_schemas(rules))
    except ValueError:
        raise InvalidRequest(
            "This form of the answer cannot be combined with tools or reasoning.",
            hint="Leave 'tools' out, and turn reasoning off.",
            param="structured_outputs",
        ) from None
    except InvalidRequest:
        if rules is None or any(tool.strict for tool in rules.tools):
            raise
    return compiled(replace(rules, tools=[replace(tool, schema=_ANY_OBJECT) for tool in rules.tools]))


def with_enforced_schemas(rules: CallRules) -> CallRules:
    """A tool that is not strict and has a schema that cannot be enforced takes any object.

    Raises InvalidRequest naming the place for a strict one, and for schemas that are too large together.
    """
    check_size(sum(_size(tool.schema) for tool in rules.tools))
    return replace(rules, tools=[_enforced(tool) for tool in rules.tools])


def _size(schema: Any) -> int:
    try:
        return len(msgspec.json.encode(schema))
    except RecursionError:  # which reading it refuses, with its place
        return 0


def _enforced(tool: CallableTool) -> CallableTool:
    try:
        read = SchemaReader(tool.place).read(tool.schema)
        if read is False or endless_place(read) is not None:
            raise InvalidRequest(f"'{tool.place}' cannot be used: nothing satisfies it.", param=tool.place)
    except InvalidRequest:
        if tool.strict:
            raise
        return replace(tool, schema=_ANY_OBJECT)
    return replace(tool, schema={**_ANY_OBJECT, **read} if isinstance(read, dict) else _ANY_OBJECT)
