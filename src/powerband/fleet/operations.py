"""Changes of what is desired, and waiting until they are carried out: what the commands share."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from powerband.errors import EnvironmentFault, UsageError
from powerband.fleet.control.controller_process import ensure_controller
from powerband.fleet.service.spec import Desired, GatewaySpec, Policy, Release
from powerband.fleet.service.status import ReplicaStatus, Status
from powerband.fleet.service.store import ServiceStore

POLL_S = 0.1
_REMOVE_S = 120.0


def service_name(served_name: str) -> str:
    """Of a service that serves a model of this name."""
    return re.sub(r"[^a-z0-9._-]+", "-", served_name.lower()).strip("-._")[:63] or "service"


def apply(folder: ServiceStore, release: Release, front: GatewaySpec, policy: Policy) -> tuple[Desired, bool]:
    """Write down what should be; False: it was so already. Raises UsageError for another model under the same name."""
    with folder.changing():
        current = folder.desired()
        if current is None or current.removed:
            made = Desired(name=folder.name, generation=1, release=release, front=front, policy=policy)
            folder.write_desired(made)
            return made, True
        if current.release.served_name != release.served_name:
            raise UsageError(
                f"The service {folder.name} serves {current.release.served_name}, not {release.served_name}.",
                hint="Deploy it as another service, with --name.",
                param="name",
            )
        status = folder.status()
        is_rejected = _is_rejected(status, current.generation)
        if not is_rejected and (current.release, current.front, current.policy) == (release, front, policy):
            return current, False
        made = with_changes(current, status, release=release, front=front, policy=policy)
        folder.write_desired(made)
        return made, True


def update_desired(folder: ServiceStore, make: Callable[[Desired, Status | None], dict[str, Any]]) -> Desired:
    """Change some of what is desired. make: the fields that differ. Raises UsageError when there is no such service."""
    with folder.changing():
        current = folder.desired()
        if current is None:
            raise UsageError(f"There is no service {folder.name!r}.", param="name")
        status = folder.status()
        made = with_changes(current, status, **make(current, status))
        folder.write_desired(made)
        return made


def with_changes(current: Desired, status: Status | None, **fields: Any) -> Desired:
    """The next generation. What runs and is all ready is what one could go back to."""
    is_whole = status is not None and status.established >= current.generation
    previous = current.release if is_whole else current.previous
    return replace(current, generation=current.generation + 1, **{"previous": previous, **fields})


def rollback(folder: ServiceStore) -> Desired | None:
    """To the release before, which runs or is started again; None: there is none."""
    with folder.changing():
        current = folder.desired()
        if current is None or current.previous is None:
            return None
        made = replace(current, generation=current.generation + 1, release=current.previous)
        folder.write_desired(made)
        return made


def watch_status(folder: ServiceStore, generation: int, timeout_s: float) -> Iterator[Status]:
    """The status as it changes, from the controller that knows this generation on, until `timeout_s` have passed.

    A controller that dies or hangs is replaced. Raises EnvironmentFault where that fails.
    """
    last_at, deadline_s = 0.0, time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        status = folder.status()
        if status is not None and status.generation >= generation and status.at != last_at:
            last_at = status.at
            yield status
        elif not folder.controller_alive():
            ensure_controller(folder)
        time.sleep(POLL_S)


def wait_for(folder: ServiceStore, generation: int, told: Callable[[Status], object], timeout_s: float) -> Status:
    """Until the generation is carried out, or given up (then `rejected` says why). Raises EnvironmentFault."""
    for status in watch_status(folder, generation, timeout_s):
        told(status)
        if _is_rejected(status, generation):
            return status
        if status.established >= generation and status.phase == "ready":
            return status
    raise EnvironmentFault(
        f"{folder.name} was not ready within {timeout_s:.0f} s.",
        hint="'powerband status' and 'powerband logs' tell more; 'powerband remove' ends it.",
    )


def remove(folder: ServiceStore, told: Callable[[Status], object], *, purge: bool) -> None:
    """End everything and forget it. Raises EnvironmentFault when something does not end."""
    desired = update_desired(folder, lambda _current, _status: {"removed": True})
    ensure_controller(folder)
    deadline_s = time.monotonic() + _REMOVE_S + desired.policy.drain_s
    while time.monotonic() < deadline_s:
        status = folder.status()
        if status is not None and status.generation >= desired.generation:
            told(status)
            if status.phase == "removed" and not folder.controller_alive():
                folder.forget(purge=purge)
                return
        if not folder.controller_alive() and (status is None or status.phase != "removed"):
            ensure_controller(folder)
        time.sleep(POLL_S)
    raise EnvironmentFault(f"{folder.name} did not end in time.", hint="'powerband status' shows what still runs.")


def find_replica(status: Status | None, id: str) -> ReplicaStatus:
    """Raises UsageError with those that there are."""
    replicas = status.replicas if status is not None else ()
    for replica in replicas:
        if replica.id == id:
            return replica
    known = ", ".join(replica.id for replica in replicas) or "none"
    raise UsageError(f"There is no replica {id!r}.", hint=f"There are: {known}.", param="replica")


def _is_rejected(status: Status | None, generation: int) -> bool:
    return status is not None and status.rejected is not None and status.rejected.generation == generation
