"""`powerband status`: replicas, load and SLO attainment of a service."""

from __future__ import annotations

import json as json_format
import time
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from powerband.cli.flags import Json
from powerband.cli.service.remove import NAME_HELP
from powerband.errors import UsageError

if TYPE_CHECKING:
    from powerband.fleet.service.store import ServiceStore

_EVERY_S = 1.0
_CLEAR = "\x1b[H\x1b[J"


def status(
    name: Annotated[str | None, Parameter(help=f"{NAME_HELP}, or all")] = None,
    /,
    *,
    watch: Annotated[bool, Parameter(help="Refresh every second, until Ctrl-C", negative="")] = False,
    json: Json = False,
) -> int:
    """Show the replicas, load and SLO attainment of a service."""
    from powerband.fleet.control.controller_process import ensure_controller
    from powerband.fleet.service.store import find_service, services

    folders = [find_service(name)] if name is not None else services()
    if not folders:
        raise UsageError("No service is deployed.", hint="'powerband deploy' starts one.", param="name")
    if not watch:
        _show(folders, as_json=json)
        return 0
    while True:
        for folder in folders:
            ensure_controller(folder)
        if not json:
            print(_CLEAR, end="")
        _show(folders, as_json=json)
        time.sleep(_EVERY_S)


def _show(folders: list[ServiceStore], *, as_json: bool) -> None:
    from powerband.cli.service.view import print_status

    for number, folder in enumerate(folders):
        desired = folder.read_spec()
        if desired is None:
            continue
        if as_json:
            print(json_format.dumps(status_dict(folder)), flush=True)
            continue
        if number:
            print()
        print_status(folder, desired, folder.read_status())


def status_dict(folder: ServiceStore) -> dict[str, object]:
    """What --json prints: status.json, with what is desired beside it."""
    import msgspec

    desired, found = folder.read_spec(), folder.read_status()
    return {
        "service": folder.name,
        "controller_alive": folder.controller_alive(),
        "desired": msgspec.to_builtins(desired),
        "status": msgspec.to_builtins(found),
        "attainment": found.load.attainment if found is not None else None,
    }
