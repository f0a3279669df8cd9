"""Arguments that are written one by one, each with its own form: Python's keywords and Qwen3-Coder's parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from powerband.output_parsers.grammar import Grammar, quoted
from powerband.structured.json_schema import with_parts

_ROOT = "arguments"  # the definition that is the whole schema
_UNDERSTOOD = frozenset(
    ("$defs", "definitions", "type", "properties", "required", "additionalProperties", "title", "description")
) | frozenset(("$schema", "$id", "$comment", "default", "examples", "strict"))


def is_list_of_properties(schema: dict[str, Any]) -> bool:
    """Whether every object with these properties, the required ones among them, satisfies the schema."""
    properties = schema.get("properties", {})
    return (
        not schema.keys() - _UNDERSTOOD
        and isinstance(properties, dict)
        and all(isinstance(value, dict) for value in properties.values())
        and set(schema.get("required", ())) <= properties.keys()
    )


def in_order(
    grammar: Grammar, prefix: str, schema: dict[str, Any], argument: Callable[[str, dict[str, Any]], str], comma: str
) -> str:
    """The properties in the schema's order; those that are not required may be left out.

    argument: the form of one, from its name and schema. comma: what stands between two of them. prefix: of the names of
    rules. Takes rules in proportion to the number of properties.
    """
    root = _moved({name: value for name, value in schema.items() if name not in ("$id", "id")}, [])
    definitions = {"$defs": {_ROOT: root}}
    required = set(schema.get("required", ()))
    names = list(schema.get("properties", {}))
    parts = [
        grammar.add(f"{prefix}_{index}", argument(name, _alone(schema["properties"][name], definitions)))
        for index, name in enumerate(names)
    ]
    if not parts:
        return ""
    between = f"{quoted(comma)} " if comma else ""
    rest = ""
    tails = [""] * (len(parts) + 1)
    for index in reversed(range(len(parts))):
        part = f"{between}{parts[index]}"
        rest = f"{part if names[index] in required else f'({part})?'} {tails[index + 1]}".strip()
        tails[index] = grammar.add(f"{prefix}_from_{index}", rest)
    first: list[str] = []
    for index, name in enumerate(names):
        first.append(f"{parts[index]} {tails[index + 1]}".strip())
        if name in required:
            break
    return f"({_choice(first)}){'' if required else '?'}"


def _alone(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """A part of a schema as a schema of its own: what it refers to is in its definitions."""
    references: list[str] = []
    moved: dict[str, Any] = _moved(schema, references)
    return {**moved, **definitions} if references else moved


def _moved(schema: Any, references: list[str]) -> Any:
    """The schema where the whole is the definition _ROOT; adds its references to `references`."""
    if not isinstance(schema, dict):
        return schema
    moved = with_parts(schema, lambda part: _moved(part, references))
    if isinstance(reference := schema.get("$ref"), str):
        references.append(reference)
        if reference == "#" or reference.startswith("#/"):
            moved["$ref"] = f"#/$defs/{_ROOT}{reference[1:]}"
    return moved


def _choice(choices: Sequence[str]) -> str:
    return " | ".join(choices)
