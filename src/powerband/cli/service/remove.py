"""`powerband remove`: stop and remove services."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from powerband.cli.service.names import SERVICE_HELP, OldName


def remove(
    services: Annotated[
        tuple[str, ...], Parameter(name="[SERVICE…]", help=SERVICE_HELP, negative="", show_default=False)
    ] = (),
    /,
    *,
    name: OldName = None,
    purge: Annotated[bool, Parameter(help="Also delete keys, usage and audit log", negative="")] = False,
) -> int:
    """Stop and remove services. Running requests may finish, then the gateway and all replicas stop.

    A service that was added to another's gateway leaves it; a gateway that still serves others is not removed.

    Keys, usage and audit log are kept for the next service of that name, unless --purge is given.
    """
    from powerband.cli.service.progress import ServiceProgress
    from powerband.fleet import operations
    from powerband.fleet.service.store import find_service

    for store in [find_service(one, name) for one in services or (None,)]:
        operations.check_removable(store)
        operations.record_action(store, "remove", {"purge": purge})
        database = store.gateway_store.database
        operations.remove(store, ServiceProgress(), purge=purge)
        kept = "" if purge and database == store.database else f" Its keys and usage are kept in {database}."
        print(f"{store.name} was removed.{kept}")
    return 0
