"""Dataclasses from tables of a file and back. Strict: what is unknown, missing or of the wrong kind is an error."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from powerband.errors import UsageError
from powerband.renamed import new_names, warn_renamed
from powerband.spec.config_reader import shown

Record = TypeVar("Record")


def read_record(kind: type[Record], values: object, where: str) -> Record:
    """An instance of a dataclass. `where`: how the table is named in messages. Raises UsageError.

    Understands numbers, texts, booleans, literals, `| None`, tuples of one kind, mappings and other dataclasses.
    Numbers must be finite and not negative. YAML reads 1e9 as a text, so a number may be one.
    """
    if not isinstance(values, Mapping):
        raise _error(where, f"{shown(values)} is not a table of names and values")
    hints = _hints(cast(Any, kind))
    values = _with_new_names(kind, values, where)
    unknown = [name for name in values if name not in hints]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), hints, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UsageError(
            f"{where}: {shown(unknown[0])} is unknown.", hint=f"{hint}Known: {', '.join(hints)}.", param=str(unknown[0])
        )
    for item in fields(cast(Any, kind)):
        if item.name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise _error(where, f"'{item.name}' is missing")
    return kind(**{name: _value(hints[name], value, f"{where}: {name}") for name, value in values.items()})


def _with_new_names(kind: Any, values: Mapping[Any, Any], where: str) -> Mapping[Any, Any]:
    renamed = new_names(kind)
    for old in renamed.keys() & values.keys():
        warn_renamed(f"{where}: '{old}'", f"'{renamed[old]}'")
    return {renamed.get(name, name): value for name, value in values.items()} if renamed else values


def as_record(value: Any, *, complete: bool = False, old_names: bool = False) -> Any:
    """What `read_record` reads: plain tables, lists and values.

    complete: with the fields that have their default. old_names: for a reader of the version before.
    """
    if is_dataclass(value) and not isinstance(value, type):
        items = [item for item in fields(value) if complete or not _default(value, item)]
        names = {item.name: item.metadata.get("was", item.name) if old_names else item.name for item in items}
        return {names[name]: as_record(getattr(value, name), complete=complete, old_names=old_names) for name in names}
    if isinstance(value, Mapping):
        return {key: as_record(item, complete=complete, old_names=old_names) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [as_record(item, complete=complete, old_names=old_names) for item in value]
    return value


def _default(value: Any, item: Any) -> bool:
    if item.default is not MISSING:
        return bool(getattr(value, item.name) == item.default)
    return item.default_factory is not MISSING and bool(getattr(value, item.name) == item.default_factory())


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _value(hint: Any, value: object, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return None if value is None else _value(next(arg for arg in args if arg is not type(None)), value, where)
    if origin is Literal:
        if value not in args:
            raise UsageError(f"{where}: {shown(value)} is none of them.", hint=f"Known: {', '.join(args)}.")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _error(where, f"{shown(value)} is not a list")
        return tuple(_value(args[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is not None:
        if not isinstance(value, Mapping):
            raise _error(where, f"{shown(value)} is not a table of names and values")
        return {_value(args[0], key, where): _value(args[1], item, f"{where}: {key}") for key, item in value.items()}
    if is_dataclass(hint):
        return read_record(cast(type[Any], hint), value, where)
    return _plain(hint, value, where)


def _plain(kind: type, value: object, where: str) -> Any:
    if kind in (int, float):
        return _number(kind, value, where)
    if not isinstance(value, kind):
        raise _error(where, f"{shown(value)} is not {'a text' if kind is str else 'true or false'}")
    return value


def _number(kind: type, value: object, where: str) -> float | int:
    number = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
    if not 0 <= number < math.inf or (kind is int and number != int(number)):
        wanted = "a whole number" if kind is int else "a number"
        raise _error(where, f"{shown(value)} is not {wanted} of 0 or more")
    return int(number) if kind is int else number


def _error(where: str, problem: str) -> UsageError:
    return UsageError(f"{where}: {problem}.", param=where.rsplit(": ", 1)[-1])
