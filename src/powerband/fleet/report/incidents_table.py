"""What `powerband incidents` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from powerband.fleet.monitor.incidents import Incident
from powerband.metrics.shown import duration_text, plain


def incident_lines(incidents: Sequence[Incident], now_s: float, service: str) -> Iterator[str]:
    """now_s: on time.time()."""
    if not incidents:
        yield f"No incidents at {service}."
    for number, one in enumerate(incidents):
        if number:
            yield ""
        since = f"{datetime.fromtimestamp(one.opened_at):%Y-%m-%d %H:%M:%S}"
        lasts = duration_text((one.closed_at or now_s) - one.opened_at)
        state = f"open for {lasts}" if one.is_open else f"over, lasted {lasts}"
        yield f"{one.id}  since {since}  {state}  cause: {one.cause.replace('_', ' ')}"
        yield f"  {plain(one.what)}"
        if one.evidence:
            yield "  evidence  " + ", ".join(f"{key} {_figure(value)}" for key, value in one.evidence.items())
        if one.advice:
            yield f"  advice    {plain(one.advice)}"
        for done in one.done:
            yield f"  done      {plain(done)}"


def _figure(value: float | str) -> str:
    return plain(value) if isinstance(value, str) else f"{value:.4g}"
