"""Typed, bounded access to the keys of a config.json: a wrong value is an error that names the key and the value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from powerband.errors import UsageError

# Far above every published model; beyond them a value is a mistake or an attack.
MAX_LAYERS = 10_000
MAX_WIDTH = 1 << 22
MAX_VOCABULARY = 1 << 26
MAX_POSITIONS = 1 << 31


class ConfigReader:
    """The keys of one configuration. Absent and null are the same unless a method says otherwise.

    Every method raises UsageError when the value has the wrong type or lies outside its bounds.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(self, name: str, default: int | None = None, *, low: int = 1, high: int = MAX_WIDTH) -> int:
        """An integer in [low, high]; without a default the key must be there."""
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise self.error(f"it has no '{name}'", name, "Add the key, or fetch the model's config.json again.")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"'{name}' must be an integer, not {shown(value)}", name)
        if not low <= value <= high:
            raise self.error(f"'{name}' must lie between {low} and {high}, not {shown(value)}", name)
        return value

    def optional_integer(self, name: str, *, low: int = 1, high: int = MAX_WIDTH) -> int | None:
        return self.integer(name, low=low, high=high) if name in self else None

    def nullable_integer(self, name: str, default: int | None, *, low: int = 1, high: int = MAX_WIDTH) -> int | None:
        """Absent: the default. Written as null: None."""
        if name in self:
            return self.integer(name, low=low, high=high)
        return None if name in self.values else default

    def number(self, name: str, default: float | None = None, *, low: float = 0.0, high: float = 1e12) -> float:
        """A finite number with low < number ≤ high; without a default the key must be there."""
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise self.error(f"it has no '{name}'", name, "Add the key, or fetch the model's config.json again.")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(f"'{name}' must be a finite number, not {shown(value)}", name)
        if not low < value <= high:
            raise self.error(f"'{name}' must be above {low:g} and at most {high:g}, not {shown(value)}", name)
        return float(value)

    def optional_number(self, name: str, *, low: float = 0.0, high: float = 1e12) -> float | None:
        return self.number(name, low=low, high=high) if name in self else None

    def boolean(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"'{name}' must be true or false, not {shown(value)}", name)
        return value

    def text(self, name: str, default: str) -> str:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(f"'{name}' must be a string, not {shown(value)}", name)
        return value

    def table(self, name: str) -> ConfigReader | None:
        """A nested object, as fields of its own. Empty is the same as absent, as in transformers."""
        value = self.values.get(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, Mapping):
            raise self.error(f"'{name}' must be an object, not {shown(value)}", name)
        return ConfigReader(value, f"{self.source}: {name}")

    def texts(self, name: str) -> list[str] | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self.error(f"'{name}' must be a list of strings, not {shown(value)}", name)
        return list(value)

    def integers(self, name: str, *, low: int = 0, high: int = MAX_WIDTH) -> tuple[int, ...]:
        """One integer or a list of them, as a tuple; absent: empty."""
        value = self.values.get(name)
        if value is None:
            return ()
        items = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and low <= item <= high for item in items):
            raise self.error(f"'{name}' must hold integers between {low} and {high}, not {shown(value)}", name)
        return tuple(items)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One id or a list of them. Some configurations write -1 where there is none, which no token is."""
        value = self.values.get(name)
        items = value if isinstance(value, list | tuple) else [value]
        values = {**self.values, name: [item for item in items if item is not None and item != -1]}
        return ConfigReader(values, self.source).integers(name, high=MAX_VOCABULARY)

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        """A list of exactly `length` positive finite numbers."""
        value = self.values.get(name)
        if not isinstance(value, list | tuple) or len(value) != length:
            found = f"{len(value)} values" if isinstance(value, list | tuple) else shown(value)
            raise self.error(f"'{name}' must be a list of {length} numbers, not {found}", name)
        for item in value:
            if isinstance(item, bool) or not isinstance(item, int | float) or not (0 < item < math.inf):
                raise self.error(f"'{name}' must hold positive numbers, not {shown(item)}", name)
        return tuple(float(item) for item in value)

    def error(self, problem: str, name: str, hint: str = "") -> UsageError:
        return UsageError(f"{self.source}: {problem}.", hint=hint, code="bad_model_config", param=name)


def shown(value: object) -> str:
    """A value as part of a sentence, never longer than a line."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "an integer of more than 60 digits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
