"""`powerband events`: what happened to a service's processes, and when."""

from __future__ import annotations

import json as json_format

from powerband.cli.flags import Json
from powerband.cli.service.names import OldName, Service
from powerband.cli.watching import Watch, show


def events(service: Service = None, /, *, name: OldName = None, watch: Watch = False, json: Json = False) -> int:
    """Show what happened to a service: starts, crashes with exit code or signal, out of memory, restarts, changes.

    The newest is last. 'powerband logs SERVICE PROCESS' prints the log of one that exited.
    """
    import msgspec

    from powerband.fleet.monitor.events import read_events
    from powerband.fleet.report.events_table import event_rows
    from powerband.fleet.service.store import find_service
    from powerband.metrics.shown import table_lines

    store = find_service(service, name)

    def text() -> str:
        found = read_events(store.events)
        if json:
            return json_format.dumps(msgspec.to_builtins(found))
        return "\n".join(table_lines(event_rows(found))) if found else f"No events at {store.name}."

    return show(text, watch=watch, clears=not json)
