"""`powerband remove`: stop and remove a service."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

NAME_HELP = "Service; default: the only one"
Name = Annotated[str | None, Parameter(help=NAME_HELP)]


def remove(
    name: Annotated[str | None, Parameter(help=NAME_HELP)] = None,
    /,
    *,
    purge: Annotated[bool, Parameter(help="Also delete keys, usage and audit log", negative="")] = False,
) -> int:
    """Stop and remove a service. Running requests may finish, then the gateway and all replicas stop.

    Its keys, usage and audit log are kept for the next service of that name, unless --purge is given.
    """
    from powerband.cli.service.view import ServiceProgress
    from powerband.fleet import operations
    from powerband.fleet.service.store import find_service

    folder = find_service(name)
    operations.record_action(folder, "remove", {"purge": purge})
    operations.remove(folder, ServiceProgress(), purge=purge)
    kept = "" if purge else f" Its keys and usage are kept in {folder.database}."
    print(f"{folder.name} was removed.{kept}")
    return 0
