"""`powerband status`: replicas, load, SLO attainment and last events of a service."""

from __future__ import annotations

import json as json_format
from typing import Annotated

from cyclopts import Parameter

from powerband.cli.flags import Json
from powerband.cli.service.names import SERVICE_HELP, OldName
from powerband.cli.watching import Watch, show
from powerband.errors import EnvironmentFault

NOT_SERVING = 3


def status(
    service: Annotated[str | None, Parameter(help=f"{SERVICE_HELP}, or all")] = None,
    /,
    *,
    name: OldName = None,
    watch: Watch = False,
    json: Json = False,
) -> int:
    """Show the replicas, load, SLO attainment and last events of a service.

    Exits with 0 if the service can answer requests: its gateway and a replica are ready. Exits with 3 if not, or if
    there is no service.
    """
    from powerband.fleet.control.controller_process import ensure_controller
    from powerband.fleet.report.status_table import is_serving, status_as_dict, status_lines
    from powerband.fleet.service.store import find_service, services

    known = services()
    try:
        stores = known if known and service is None and name is None else [find_service(service, name)]
    except EnvironmentFault:
        if json:
            print("null")
        raise

    def text() -> str:
        if watch:
            for store in stores:
                ensure_controller(store)
        if json:
            return "\n".join(json_format.dumps(status_as_dict(store)) for store in stores)
        shown = [status_lines(store, desired) for store in stores if (desired := store.read_spec()) is not None]
        return "\n\n".join("\n".join(lines) for lines in shown)

    show(text, watch=watch, clears=not json)
    return 0 if all(map(is_serving, stores)) else NOT_SERVING
