"""The schemas of tools as far as they can be enforced while the model writes."""

from __future__ import annotations

from dataclasses import replace

from powerband.errors import InvalidRequest
from powerband.output_parsers.grammar import CallableTool, CallRules
from powerband.structured.finite import endless_place
from powerband.structured.json_schema import SchemaReader

_ANY_OBJECT = {"type": "object"}


def with_enforced_schemas(rules: CallRules) -> CallRules:
    """A tool that is not strict and has a schema that cannot be enforced takes any object.

    Raises InvalidRequest naming the place for a strict one.
    """
    return replace(rules, tools=[_enforced(tool) for tool in rules.tools])


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
