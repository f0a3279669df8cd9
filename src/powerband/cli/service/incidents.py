"""`powerband incidents`: problems of a service, with their likely cause and what to do."""

from __future__ import annotations

import json as json_format
import time
from typing import Annotated

from cyclopts import Parameter

from powerband.cli.flags import Json
from powerband.cli.service.names import OldName, Service
from powerband.cli.watching import Watch, show


def incidents(
    service: Service = None,
    /,
    *,
    name: OldName = None,
    all: Annotated[bool, Parameter(help="Include closed incidents", negative="")] = False,
    watch: Watch = False,
    json: Json = False,
) -> int:
    """Show what puts the SLO of a service at risk: since when, the likely cause, and what to do.

    Crashes and restarts of its processes are in 'powerband events'.
    """
    import msgspec

    from powerband.fleet.monitor.incidents import read_incidents
    from powerband.fleet.report.incidents_table import incident_lines
    from powerband.fleet.service.store import find_service

    store = find_service(service, name)

    def text() -> str:
        newest_first = [one for one in reversed(read_incidents(store.incidents)) if all or one.is_open]
        if json:
            return json_format.dumps(msgspec.to_builtins(newest_first))
        return "\n".join(incident_lines(newest_first, time.time(), store.name))

    return show(text, watch=watch, clears=not json)
