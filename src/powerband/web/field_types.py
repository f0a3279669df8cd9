"""What a field may hold, in plain words, from the types that requests are decoded with."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from msgspec import inspect

_STEP = re.compile(r"\.(\w+)|\[(\d+|\.\.\.)\]")
_NOTHING = "null"


def allowed_values(kind: type[Any], path: str, *, of_key: bool = False) -> str:
    """What the value at `path` must be, such as 'a whole number from 1 to 16'.

    path: as msgspec writes it, without the '$', such as '.messages[0].role'. of_key: the keys of the object there.
    '' where the path leads nowhere.
    """
    found = _types_at(kind, path)
    if of_key:
        found = [key for one in found if isinstance(one, inspect.DictType) for key in _members(one.key_type)]
    described = dict.fromkeys(words for one in found if (words := _words(one)) != _NOTHING)
    return " or ".join(described) or (_NOTHING if found else "")


def field_names(kind: type[Any], path: str = "") -> list[str]:
    """The names that an object's fields may have; empty for an object with arbitrary keys."""
    objects = [one for one in _types_at(kind, path) if isinstance(one, inspect.StructType)]
    return [field.encode_name for one in objects for field in one.fields]


def whole_number_fields(kind: type[Any]) -> list[str]:
    """The names of a request's fields that are whole numbers, and no other kind of number."""
    names = field_names(kind)
    types = {name: set(map(type, _types_at(kind, f".{name}"))) for name in names}
    return [name for name in names if inspect.IntType in types[name] and inspect.FloatType not in types[name]]


def _types_at(kind: Any, path: str) -> list[inspect.Type]:
    found = _members(_root(kind))
    for name, _ in _STEP.findall(path):
        found = [inner for one in found for inner in _inside(one, name)]
    return found


@cache
def _root(kind: Any) -> inspect.Type:
    return inspect.type_info(kind)


def _members(kind: inspect.Type) -> list[inspect.Type]:
    """The alternatives of a type, without descriptions."""
    if isinstance(kind, inspect.Metadata):
        return _members(kind.type)
    if isinstance(kind, inspect.UnionType):
        return [member for one in kind.types for member in _members(one)]
    return [kind]


def _inside(kind: inspect.Type, name: str) -> list[inspect.Type]:
    """The types of an object's field, or, without a name, of the items of a list or an object."""
    if isinstance(kind, inspect.StructType) and name and name == kind.tag_field:
        return [inspect.LiteralType((kind.tag,))]
    if isinstance(kind, inspect.StructType) and name:
        return [member for field in kind.fields if field.encode_name == name for member in _members(field.type)]
    if isinstance(kind, inspect.DictType):
        return _members(kind.value_type)
    if isinstance(kind, inspect.ListType) and not name:
        return _members(kind.item_type)
    return []


def _words(kind: inspect.Type) -> str:
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        noun = "a whole number" if isinstance(kind, inspect.IntType) else "a number"
        return f"{noun} {_range(kind)}".rstrip()
    if isinstance(kind, inspect.StrType):
        return f"a text {_length(kind, 'characters')}".rstrip()
    if isinstance(kind, inspect.ListType):
        return f"a list {_length(kind, 'entries')}".rstrip()
    if isinstance(kind, inspect.DictType):
        return f"an object {_length(kind, 'entries')}".rstrip()
    if isinstance(kind, inspect.LiteralType):
        values = [f'"{value}"' for value in kind.values]
        return values[0] if len(values) == 1 else "one of " + ", ".join(values)
    plain: dict[type[inspect.Type], str] = {inspect.BoolType: "true or false", inspect.NoneType: _NOTHING}
    return plain.get(type(kind), "an object" if isinstance(kind, inspect.StructType) else "another value")


def _range(kind: inspect.IntType | inspect.FloatType) -> str:
    low, high = kind.ge, kind.le
    if kind.gt is not None:
        return f"above {kind.gt}" + (f" and at most {high}" if high is not None else "")
    if low is not None and high is not None:
        return f"from {low} to {high}"
    if low is not None:
        return f"of at least {low}"
    return f"of at most {high}" if high is not None else ""


def _length(kind: inspect.StrType | inspect.ListType | inspect.DictType, unit: str) -> str:
    low, high = kind.min_length or 0, kind.max_length
    if high == 0:
        return "that is empty"
    if low and high is not None:
        return f"of {low} to {high} {unit}"
    if low:
        return "that is not empty" if low == 1 else f"of at least {low} {unit}"
    return f"of at most {high} {unit}" if high is not None else ""
