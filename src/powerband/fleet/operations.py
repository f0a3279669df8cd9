"""Operations of the commands on a service: change its desired state, and wait until the controller has applied it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import msgspec

from powerband.errors import EnvironmentFault, PowerbandError, UsageError
from powerband.fleet.control.controller_process import ensure_controller
from powerband.fleet.service.spec import GatewaySpec, Policy, Release, ServiceSpec
from powerband.fleet.service.status import ReplicaStatus, ServiceStatus
from powerband.fleet.service.store import ServiceStore, endpoint, services_behind
from powerband.http_client.request import bearer, request_sync

POLL_INTERVAL_S = 0.1
_REMOVE_TIMEOUT_S = 120.0
_AUDIT_TIMEOUT_S = 3.0


def service_name(served_name: str) -> str:
    """The default name of a service that serves a model of this name."""
    return re.sub(r"[^a-z0-9._-]+", "-", served_name.lower()).strip("-._")[:63] or "service"


def apply(
    store: ServiceStore, release: Release, gateway: GatewaySpec, policy: Policy, gateway_service: str = ""
) -> tuple[ServiceSpec, bool]:
    """Write the desired state. Returns False if it is the same already. Raises UsageError for another model.

    gateway_service: the service whose gateway serves the model; '': its own.
    """
    with store.lock_spec():
        current = store.read_spec()
        if current is None or current.removed:
            spec = ServiceSpec(
                name=store.name,
                generation=1,
                release=release,
                gateway=gateway,
                policy=policy,
                shared_gateway=gateway_service or msgspec.UNSET,
            )
            store.write_spec(spec)
            return spec, True
        if current.release.served_name != release.served_name:
            raise UsageError(
                f"The service {store.name} serves {current.release.served_name}, not {release.served_name}.",
                hint="Deploy it as another service, with --name.",
                param="name",
            )
        if current.gateway_service != gateway_service:
            raise UsageError(
                f"The service {store.name} is behind {_gateway_name(current.gateway_service)}.",
                hint="Remove it first to change that, or deploy it under another --name.",
                param="gateway",
            )
        status = store.read_status()
        has_failed = status is not None and status.has_failed(current.generation)
        if not has_failed and (current.release, current.gateway, current.policy) == (release, gateway, policy):
            return current, False
        spec = _with_changes(current, status, release=release, gateway=gateway, policy=policy)
        store.write_spec(spec)
        return spec, True


def update_spec(
    store: ServiceStore, change: Callable[[ServiceSpec, ServiceStatus | None], dict[str, Any]]
) -> ServiceSpec:
    """Change the desired state. change: returns the fields to change. Raises UsageError if there is no such service."""
    with store.lock_spec():
        current = store.read_spec()
        if current is None:
            raise UsageError(f"There is no service {store.name!r}.", param="name")
        status = store.read_status()
        spec = _with_changes(current, status, **change(current, status))
        store.write_spec(spec)
        return spec


def rollback(store: ServiceStore) -> ServiceSpec | None:
    """Roll back to the last release that was ready. None: there is none."""
    with store.lock_spec():
        current = store.read_spec()
        if current is None or current.previous is None:
            return None
        spec = current.updated(release=current.previous)
        store.write_spec(spec)
        return spec


def watch_status(store: ServiceStore, generation: int, timeout_s: float) -> Iterator[ServiceStatus]:
    """Yield each new status of this generation or a later one, for at most `timeout_s`.

    Replaces a controller that has crashed or hangs. Raises EnvironmentFault if that fails.
    """
    last_at, deadline_s = 0.0, time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        status = store.read_status()
        if status is not None and status.generation >= generation and status.at != last_at:
            last_at = status.at
            yield status
        elif not store.controller_alive():
            ensure_controller(store)
        time.sleep(POLL_INTERVAL_S)


def wait_for(
    store: ServiceStore, generation: int, on_status: Callable[[ServiceStatus], object], timeout_s: float
) -> ServiceStatus:
    """Wait until the generation is ready, or has failed (`has_failed`). Raises EnvironmentFault after `timeout_s`."""
    for status in watch_status(store, generation, timeout_s):
        on_status(status)
        if status.has_failed(generation):
            return status
        if status.last_ready_generation >= generation and status.phase == "ready":
            return status
    raise EnvironmentFault(
        f"{store.name} was not ready within {timeout_s:.0f} s.",
        hint=f"See 'powerband events {store.name}' and 'powerband logs {store.name}'; 'powerband remove' stops it.",
    )


def remove(store: ServiceStore, on_status: Callable[[ServiceStatus], object], *, purge: bool) -> None:
    """Stop everything and delete the state. A service behind another's gateway only loses its model there.

    Raises UsageError if the gateway serves the models of other services, EnvironmentFault if something does not stop.
    """
    check_removable(store)
    spec = update_spec(store, lambda _current, _status: {"removed": True})
    with going_on(store, "is still being removed"):
        _wait_for_removal(store, spec, on_status, purge=purge)


def _gateway_name(service: str) -> str:
    return f"the gateway of {service}" if service else "a gateway of its own"


def check_removable(store: ServiceStore) -> None:
    """Raises UsageError if other services' models are served by the gateway of this one."""
    if behind := [one.name for one in services_behind(store)]:
        raise UsageError(
            f"The gateway of {store.name} also serves {', '.join(behind)}.",
            hint=f"Remove them first: powerband remove {' '.join(behind)} {store.name}",
            param="name",
        )


def _wait_for_removal(
    store: ServiceStore, spec: ServiceSpec, on_status: Callable[[ServiceStatus], object], *, purge: bool
) -> None:
    ensure_controller(store)
    deadline_s = time.monotonic() + _REMOVE_TIMEOUT_S + spec.policy.drain_timeout_s
    while time.monotonic() < deadline_s:
        status = store.read_status()
        if status is not None and status.generation >= spec.generation:
            on_status(status)
            if status.phase == "removed" and not store.controller_alive():
                store.delete(purge=purge)
                return
        if not store.controller_alive() and (status is None or status.phase != "removed"):
            ensure_controller(store)
        time.sleep(POLL_INTERVAL_S)
    raise EnvironmentFault(
        f"{store.name} did not stop in time.", hint=f"'powerband status {store.name}' shows what still runs."
    )


def drain(store: ServiceStore, replica: str, *, undo: bool, wait: bool) -> ReplicaStatus | None:
    """Send a replica no new requests (undo: again), and with `wait` wait until its requests have finished. Returns its
    status then; None: it has exited. Raises UsageError for an unknown replica.
    """

    def change(current: ServiceSpec, status: ServiceStatus | None) -> dict[str, Any]:
        found = find_replica(status, replica)
        if undo and found.id not in current.drained:
            raise UsageError(f"{replica} was not drained.", param="replica")
        others = tuple(id for id in current.drained if id != replica)
        return {"drained": others if undo else (*others, replica)}

    desired = update_spec(store, change)
    with going_on(store, f"drains {replica}"):
        ensure_controller(store)
        record_action(store, "undrain" if undo else "drain", {"replica": replica})
        found = None
        for status in watch_status(store, desired.generation, desired.policy.drain_timeout_s):
            found = next((one for one in status.replicas if one.id == replica), None)
            is_done = found is None or undo or (found.state == "drained" and not found.running)
            if is_done or not wait:
                break
    return found


def is_last_ready(store: ServiceStore, replica: str) -> bool:
    """Whether no other replica is ready and gets requests."""
    desired, status = store.read_spec(), store.read_status()
    drained = desired.drained if desired is not None else ()
    replicas = status.replicas if status is not None else ()
    return not any(one.state == "ready" and one.id not in drained and one.id != replica for one in replicas)


@contextmanager
def going_on(store: ServiceStore, what: str) -> Iterator[None]:
    """While a command only waits for the controller: Ctrl-C ends the command alone, and says what goes on."""
    try:
        yield
    except KeyboardInterrupt:
        name = store.name
        raise KeyboardInterrupt(
            f"{name} {what}. 'powerband status {name} --watch' shows it, 'powerband remove {name}' stops it."
        ) from None


def find_replica(status: ServiceStatus | None, id: str) -> ReplicaStatus:
    """Raises UsageError that lists the replicas."""
    replicas = status.replicas if status is not None else ()
    for replica in replicas:
        if replica.id == id:
            return replica
    known = ", ".join(replica.id for replica in replicas) or "none"
    raise UsageError(f"There is no replica {id!r}.", hint=f"Replicas: {known}.", param="replica")


def record_action(store: ServiceStore, action: str, details: Mapping[str, Any]) -> None:
    """Write a user's action to the gateway's audit log. Without a gateway, the action succeeds unrecorded."""
    with suppress(PowerbandError, OSError, ValueError):
        url, key = endpoint(store.name)
        body = {"action": f"fleet.{action}", "what": dict(details)}
        request_sync("POST", f"{url}/admin/audit", json=body, headers=bearer(key), timeout_s=_AUDIT_TIMEOUT_S)


def _with_changes(current: ServiceSpec, status: ServiceStatus | None, **fields: Any) -> ServiceSpec:
    """The next generation. If the current release was completely ready, it becomes the one for rollbacks."""
    is_established = status is not None and status.last_ready_generation >= current.generation
    previous = current.release if is_established else current.previous
    return current.updated(**{"previous": previous, **fields})
