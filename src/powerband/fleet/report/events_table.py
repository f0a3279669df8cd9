"""Events as rows of a table."""

from __future__ import annotations

import time
from collections.abc import Sequence

from powerband.fleet.monitor.events import Event
from powerband.metrics.shown import duration_text, plain

_HEADINGS = ("last seen", "type", "reason", "object", "message")


def event_rows(events: Sequence[Event], now_s: float | None = None) -> list[Sequence[str]]:
    """Headings, then the events in their order. now_s: on time.time()."""
    now_s = time.time() if now_s is None else now_s
    return [_HEADINGS, *(_row(event, now_s) for event in events)]


def _row(event: Event, now_s: float) -> Sequence[str]:
    seen = f"{duration_text(now_s - event.last_seen)} ago"
    if event.count > 1:
        seen += f" (x{event.count} in {duration_text(event.last_seen - event.first_seen)})"
    return seen, event.type, event.reason, event.subject, plain(event.message)
