"""Alternatives of `oneOf` that exclude each other: they are enforced as `anyOf`, which the library does exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

_MAX_REFERENCES = 16  # one after the other
_MAX_NAMES = 16  # of properties that are tried
_KINDS = {
    **{"string": ("string",), "integer": ("integer",), "number": ("integer", "number"), "boolean": ("boolean",)},
    **{"null": ("null",), "array": ("array",), "object": ("object",)},
}


@dataclass(slots=True)
class _Facts:
    """What is known of the values that a schema takes. None: nothing.

    constants: by property, the values that it may have, as JSON.
    """

    kinds: frozenset[str] | None = None
    values: frozenset[str] | None = None
    constants: dict[str, frozenset[str]] = field(default_factory=dict)


class Alternatives:
    """Of one schema. Looks at every definition once, so that it takes time in proportion to the schema's size."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._known: dict[str, _Facts] = {}

    def exclusive(self, schemas: Sequence[Any], discriminator: Any = None) -> list[Any] | None:
        """The same schemas where no value satisfies two of them; None where that cannot be seen.

        Objects that differ by the constants of a property are given that property as a required one: without it, a
        value could satisfy several.
        """
        facts = [self._facts(schema) for schema in schemas]
        is_object = [one.kinds == frozenset(("object",)) for one in facts]
        name = _telling([one for one, yes in zip(facts, is_object, strict=True) if yes], discriminator)
        if name is None or not _differ([one for one, yes in zip(facts, is_object, strict=True) if not yes]):
            return None
        if any(is_object) and any(
            one.kinds is None or "object" in one.kinds for one, yes in zip(facts, is_object, strict=True) if not yes
        ):
            return None
        return [
            {**schema, "required": list(dict.fromkeys((*schema.get("required", ()), name)))} if yes and name else schema
            for schema, yes in zip(schemas, is_object, strict=True)
        ]

    def _facts(self, schema: Any, depth: int = 0) -> _Facts:
        facts = _Facts()
        if not isinstance(schema, dict) or depth > _MAX_REFERENCES:
            return facts
        reference, parts = schema.get("$ref"), schema.get("allOf")
        if isinstance(reference, str):
            if reference not in self._known:
                self._known[reference] = _Facts()  # for one that leads back to itself
                self._known[reference] = self._facts(self._target(reference), depth + 1)
            _add(facts, self._known[reference])
        if isinstance(parts, list) and len(parts) == 1:  # as older pydantic writes a reference
            _add(facts, self._facts(parts[0], depth + 1))
        _add(facts, _own(schema))
        return facts

    def _target(self, reference: str) -> Any:
        node = self._root
        for part in reference.removeprefix("#").split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            node = node.get(key) if isinstance(node, dict) else None
        return node


def _own(schema: Mapping[str, Any]) -> _Facts:
    kinds, values = schema.get("type"), _constants(schema)
    names = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []
    facts = _Facts(values=values)
    if names and all(isinstance(name, str) and name in _KINDS for name in names):
        facts.kinds = frozenset(kind for name in names for kind in _KINDS[name])
    properties = schema.get("properties")
    for name, part in properties.items() if isinstance(properties, dict) else ():
        if isinstance(part, dict) and (found := _constants(part)) is not None:
            facts.constants[name] = found
    return facts


def _constants(schema: Mapping[str, Any]) -> frozenset[str] | None:
    """The values that a schema lists, if none is a number with a fraction, an array or an object."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or not all(value is None or isinstance(value, str | int) for value in values):
        return None
    return frozenset(map(json.dumps, values))


def _add(facts: _Facts, other: _Facts) -> None:
    """All of it holds together."""
    facts.kinds = other.kinds if facts.kinds is None else facts.kinds
    facts.values = other.values if facts.values is None else facts.values
    facts.constants = {**other.constants, **facts.constants} if facts.constants else other.constants


def _telling(objects: Sequence[_Facts], discriminator: Any) -> str | None:
    """A property whose constants are others in each of the objects; "" where there are no two; None: there is none."""
    if len(objects) < 2:
        return ""
    named = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
    names = [named] if isinstance(named, str) else []
    for name in (*names, *islice(objects[0].constants, _MAX_NAMES)):
        if _are_disjoint([one.constants.get(name) for one in objects]):
            return name
    return None


def _differ(others: Sequence[_Facts]) -> bool:
    return _are_disjoint([one.kinds for one in others]) or _are_disjoint([one.values for one in others])


def _are_disjoint(sets: Sequence[frozenset[str] | None]) -> bool:
    known = [one for one in sets if one is not None]
    return len(known) == len(sets) and len(frozenset().union(*known)) == sum(map(len, known))
