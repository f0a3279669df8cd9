"""`powerband incidents`: problems of a service, with their likely cause and what to do."""

from __future__ import annotations

import json as json_format
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from powerband.cli.flags import Json
from powerband.cli.service.remove import Name

if TYPE_CHECKING:
    from powerband.fleet.monitor.incidents import Incident
    from powerband.fleet.service.store import ServiceStore

_EVERY_S = 1.0
_CLEAR = "\x1b[H\x1b[J"


def incidents(
    name: Name = None,
    /,
    *,
    all: Annotated[bool, Parameter(help="Include closed incidents", negative="")] = False,
    watch: Annotated[bool, Parameter(help="Refresh every second, until Ctrl-C", negative="")] = False,
    json: Json = False,
) -> int:
    """Show what puts the SLO of a service at risk: since when, the likely cause, and what to do."""
    from powerband.fleet.service.store import find_service

    folder = find_service(name)
    while True:
        found = _read(folder, with_closed=all)
        if json:
            print(json_format.dumps([_as_dict(one) for one in found]), flush=True)
        else:
            print((_CLEAR if watch else "") + "\n".join(_lines(found, time.time(), folder.name)), flush=True)
        if not watch:
            return 0
        time.sleep(_EVERY_S)


def _read(folder: ServiceStore, *, with_closed: bool) -> list[Incident]:
    """The newest first."""
    from powerband.fleet.monitor.incidents import read_incidents

    return [one for one in reversed(read_incidents(folder.incidents)) if with_closed or one.is_open]


def _as_dict(incident: Incident) -> dict[str, object]:
    import msgspec

    found: dict[str, object] = msgspec.to_builtins(incident)
    return found


def _lines(incidents: Sequence[Incident], now_s: float, service: str) -> Iterator[str]:
    from powerband.cli.service.view import duration_text
    from powerband.metrics.shown import plain

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
    from powerband.metrics.shown import plain

    return plain(value) if isinstance(value, str) else f"{value:.4g}"
