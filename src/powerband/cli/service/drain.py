"""`powerband drain`: stop sending new requests to a replica, or resume."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from powerband.cli.service.remove import Name
from powerband.errors import UsageError

if TYPE_CHECKING:
    from powerband.fleet.service.spec import ServiceSpec
    from powerband.fleet.service.status import ServiceStatus


def drain(
    replica: Annotated[str, Parameter(help="Id of the replica, from 'powerband status'")],
    /,
    *,
    name: Name = None,
    undo: Annotated[bool, Parameter(help="Send it requests again", negative="")] = False,
    wait: Annotated[bool, Parameter(help="Wait until its requests have finished")] = True,
) -> int:
    """Stop sending new requests to a replica. Its requests finish; it keeps running and is not replaced."""
    from powerband.fleet import operations
    from powerband.fleet.control.controller_process import ensure_controller
    from powerband.fleet.service.store import find_service

    folder = find_service(name)

    def change(current: ServiceSpec, status: ServiceStatus | None) -> dict[str, Any]:
        found = operations.find_replica(status, replica)
        if undo and found.id not in current.drained:
            raise UsageError(f"{replica} was not drained.", param="replica")
        others = tuple(id for id in current.drained if id != replica)
        return {"drained": others if undo else (*others, replica)}

    desired = operations.update_spec(folder, change)
    ensure_controller(folder)
    operations.record_action(folder, "undrain" if undo else "drain", {"replica": replica})
    if not undo:
        _warn_where_nothing_serves(desired, folder.read_status())
    found = None
    for status in operations.watch_status(folder, desired.generation, desired.policy.drain_timeout_s):
        found = next((one for one in status.replicas if one.id == replica), None)
        is_done = found is None or undo or (found.state == "drained" and not found.running)
        if is_done or not wait:
            break
    if undo:
        print(f"{replica} gets requests again.")
    elif found is not None and found.running:
        print(f"{replica} gets no new requests; {found.running} are still running.")
    else:
        print(f"{replica} is drained. To undo: powerband drain {replica} --undo")
    return 0


def _warn_where_nothing_serves(desired: ServiceSpec, status: ServiceStatus | None) -> None:
    replicas = status.replicas if status is not None else ()
    if not any(one.state == "ready" and one.id not in desired.drained for one in replicas):
        print(
            "warning: no other replica is ready: requests will wait in the queue, and then time out.", file=sys.stderr
        )
