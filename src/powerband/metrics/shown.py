"""How figures and foreign text are written for people, wherever they are shown."""

from __future__ import annotations

from collections.abc import Sequence

from powerband.metrics.record import Outcome
from powerband.metrics.statistics import Interval

NONE = "–"
# Figures in the order in which a request goes through them.
FIGURES = {
    "ttft": "TTFT",
    "service_ttft": "service TTFT",
    "tpot": "TPOT",
    "itl": "ITL",
    "stall": "stall",
    "e2e": "E2E",
    "send_lag": "send lag",
}
INVALID = {"invalid": "without the form that was asked for"}  # a reason to miss an SLO
OUTCOMES = {
    Outcome.OK.value: "answered",
    Outcome.ERROR.value: "failed",
    Outcome.REFUSED.value: "refused",
    Outcome.TIMED_OUT.value: "timed out",
    Outcome.ABORTED.value: "in flight when the load was stopped",
}


def plain(text: str) -> str:
    """Text from elsewhere without what a terminal would obey: control characters, and marks that turn its direction."""
    return "".join(char if char.isprintable() else "�" for char in text)


def time_text(seconds: float | None) -> str:
    """Three digits that count: '0.42 ms', '118 ms', '1.25 s', '187 s'; '–' for None."""
    if seconds is None:
        return NONE
    size = abs(seconds)
    return f"{digits(seconds)} s" if size >= 0.9995 else f"{digits(seconds * 1000)} ms"


def digits(value: float | None) -> str:
    """Three digits that count, and all those before the point: '0.042', '4.20', '42.0', '4,200'; '–' for None."""
    if value is None:
        return NONE
    size = abs(value)
    if size >= 99.95 or size == 0:
        return f"{value:,.0f}"
    places = 1 if size >= 9.995 else 2 if size >= 0.9995 else 3
    return f"{value:.{places}f}"


def share_text(share: float | None) -> str:
    """'97.3 %'; only all is '100 %', and only none is '0 %'."""
    if share is None:
        return NONE
    if share in (0.0, 1.0):
        return f"{share * 100:.0f} %"
    return f"{min(max(share * 100, 0.1), 99.9):.1f} %"


def share_interval_text(interval: Interval | None) -> str:
    return NONE if interval is None else f"{interval[0] * 100:.1f}–{interval[1] * 100:.1f} %"


def time_interval_text(interval: Interval | None) -> str:
    """Both ends in the larger one's unit: '480–560 ms'."""
    if interval is None:
        return NONE
    unit, factor = ("s", 1.0) if abs(interval[1]) >= 0.9995 else ("ms", 1000.0)
    return f"{digits(interval[0] * factor)}–{digits(interval[1] * factor)} {unit}"


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells in left-aligned columns, as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def duration_text(seconds: float) -> str:
    """'42 s', '7 min', '3.5 h', '12 days'."""
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"
