"""Quantities as people write them on a command line or in a file: `500ms`, `2m`, `95%`."""

from __future__ import annotations

import math
import re

from powerband.errors import UsageError

SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_NUMBER = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)"


def seconds(text: str, *, param: str, unit: str | None = "s") -> float:
    """'500ms' → 0.5. A bare number is in `unit`; None: it needs one. Raises UsageError naming `param`."""
    found = re.fullmatch(_NUMBER + r"\s*([a-z]*)", text.strip().lower())
    factor = SECONDS.get(found[2] or unit or "") if found else None
    value = float(found[1]) * factor if found is not None and factor is not None else math.inf
    if math.isinf(value):
        raise UsageError(
            f"{param} is '{text}', which is not a duration.", hint="Write it like 500ms, 30s, 2m or 1h.", param=param
        )
    return value


def share(text: str, *, param: str) -> float:
    """'95%' and '0.95' → 0.95. Raises UsageError outside (0, 1]."""
    found = re.fullmatch(_NUMBER + r"\s*(%?)", text.strip())
    value = float(found[1]) / (100 if found[2] else 1) if found else math.nan
    if not 0 < value <= 1:
        raise UsageError(
            f"{param} is '{text}', which is not a fraction.", hint="Write it like 95% or 0.95.", param=param
        )
    return value


def number(text: str, *, param: str, low: float = 0.0, high: float = 1e9) -> float:
    """A finite number with low < number ≤ high. Raises UsageError naming `param`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low < value <= high:
        raise UsageError(f"{param} is '{text}'; it must be a number above {low:g} and up to {high:g}.", param=param)
    return value


def shown_seconds(value: float) -> str:
    """0.5 → '500ms', as `seconds` reads it back, to the nanosecond."""
    number, unit = (value, "s") if value >= 1 else (value * 1000, "ms")
    digits = f"{number:.9f}" if unit == "s" else f"{number:.6f}"
    return digits.rstrip("0").rstrip(".") + unit


def count_text(count: int, noun: str) -> str:
    """'1 request', '2,000 requests'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


HOURS = {"h": 1.0, "hour": 1.0, "day": 24.0, "month": 730.0}


def dollars_per_hour(text: str) -> float:
    """'4/h', '$100/day', '2900/month', or a bare number an hour. Raises UsageError."""
    match = re.fullmatch(r"\$?\s*([0-9.]+)\s*(?:/\s*([a-z]+))?", text.strip().lower())
    if match is None or (match[2] or "h") not in HOURS:
        raise UsageError(
            f"budget is '{text}', which is not a price.",
            hint="Write it like 4/h, 100/day or 2900/month.",
            param="budget",
        )
    return number(match[1], param="budget") / HOURS[match[2] or "h"]
