"""What the official clients' own types say of an answer: every field is known, and has the type that it should."""

from __future__ import annotations

import functools
from typing import Any

import pydantic

# OpenAI's servers send it, but its client has no field for it.
_KNOWN_EXTRAS = {"Response": {"store"}}


def validated(kind: Any, value: Any) -> Any:
    """`value` as an object of a client's type. Raises AssertionError for a field that the type does not have."""
    found = _adapter(kind).validate_python(value)
    _check_extras(found, type(found).__name__)
    return found


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    """Made once for each type: for all events of a stream, that takes a second."""
    return pydantic.TypeAdapter(kind)


def _check_extras(value: Any, place: str) -> None:
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check_extras(item, f"{place}[{index}]")
    elif isinstance(value, pydantic.BaseModel):
        kind = type(value)
        unknown = set(value.model_extra or ()) - _KNOWN_EXTRAS.get(kind.__name__, set())
        assert not unknown, f"{place} has the unknown fields {unknown}"
        for name in kind.model_fields:
            _check_extras(getattr(value, name), f"{place}.{name}")
