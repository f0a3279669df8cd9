"""`powerband remove`: end a service, and forget it."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

NAME_HELP = "The service; default: the only one"
Name = Annotated[str | None, Parameter(help=NAME_HELP)]


def remove(
    name: Annotated[str | None, Parameter(help=NAME_HELP)] = None,
    /,
    *,
    purge: Annotated[bool, Parameter(help="Also delete keys, usage and audit log", negative="")] = False,
) -> int:
    """End a service: running requests may finish, then the gateway and all replicas stop.

    Its keys, usage and audit log are kept for the next one of that name, unless --purge.
    """
    from powerband.cli.service.view import ServiceProgress
    from powerband.fleet import operations
    from powerband.fleet.service.store import find_service

    folder = find_service(name)
    operations.record_action(folder, "remove", {"purge": purge})
    operations.remove(folder, ServiceProgress(), purge=purge)
    kept = "" if purge else f" Its books are kept: {folder.database}"
    print(f"{folder.name} is removed.{kept}")
    return 0
