"""What `powerband status` prints of a service."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from powerband.fleet.monitor.events import read_events
from powerband.fleet.report.events_table import event_rows
from powerband.fleet.service.spec import ServiceSpec
from powerband.fleet.service.status import ReplicaStatus, ServiceStatus
from powerband.fleet.service.store import ServiceStore
from powerband.fleet.targets.local import running_instances
from powerband.metrics.shown import duration_text, share_text, table_lines
from powerband.spec.quantities import count_text
from powerband.spec.slo import SLO

LAST_EVENTS = 5
_HEADINGS = ("replica", "state", "pool", "revision", "pid", "port", "running", "waiting", "KV", "up", "restarts")


def read_observed_status(store: ServiceStore) -> ServiceStatus | None:
    """The controller's last status. If no controller is alive to keep it, as after a crash or a reboot, the processes
    that have exited since are shown as such. None: there is no status yet.
    """
    status = store.read_status()
    if status is None or store.controller_alive():
        return status
    running = running_instances(store.path)
    replicas = tuple(one if one.id in running else _exited(one) for one in status.replicas)
    gateway, spec = status.gateway, store.read_spec()
    if spec is not None and spec.gateway_service:
        owner = read_observed_status(ServiceStore.named(spec.gateway_service))
        gateway = msgspec.structs.replace(gateway, state=owner.gateway.state if owner is not None else "down")
    elif not any(id.startswith("gateway-") for id in running):
        gateway = msgspec.structs.replace(gateway, state="down", pid=0, started_at=0.0, ready_at=None)
    phase = status.phase
    if not running:
        phase = "down"
    elif gateway.state == "down" or any(one.state == "exited" for one in replicas):
        phase = "degraded"
    return msgspec.structs.replace(status, replicas=replicas, gateway=gateway, phase=phase)


def status_as_dict(store: ServiceStore) -> dict[str, object]:
    """What `status --json` prints: the status, with what is desired, and the last events."""
    found = read_observed_status(store)
    return {
        "service": store.name,
        "controller_alive": store.controller_alive(),
        "desired": msgspec.to_builtins(store.read_spec()),
        "status": msgspec.to_builtins(found),
        "attainment": found.load.attainment if found is not None else None,
        "events": msgspec.to_builtins(read_events(store.events)[-LAST_EVENTS:]),
    }


def is_serving(store: ServiceStore) -> bool:
    """Whether the gateway and at least one replica are ready."""
    status = read_observed_status(store)
    if status is None or status.gateway.state != "ready":
        return False
    return any(one.state == "ready" for one in status.replicas)


def status_lines(store: ServiceStore, desired: ServiceSpec) -> list[str]:
    status = read_observed_status(store)
    rows = [["service", desired.name], ["model", desired.release.served_name]]
    if status is None:
        return table_lines([*rows, ["state", f"not known yet; 'powerband logs {store.name} controller' may say why"]])
    rows.append(["state", _state_text(store, status)])
    rows.append(["revision", f"{status.revision or 'none'} (generation {status.generation})"])
    gateway = f"{status.gateway.url}/v1  {status.gateway.state}, pid {status.gateway.pid or 'none'}"
    rows.append(["gateway", f"{gateway}, of {desired.gateway_service}" if desired.gateway_service else gateway])
    rows.append(["promise", promise_text(desired)])
    if status.gateway.note:
        rows.append(["", status.gateway.note])
    load, promised = status.load, desired.release.plan["promise"]["rate"]
    rate = f"{load.requests_per_s:.2f} requests/s of {promised:.3g}"
    rows.append(["load", f"{rate}, {load.running} running, {load.queued} queued"])
    rows.append(["attainment", _attainment_text(desired, status)])
    rows += [["note", note] for note in status.notes]
    if status.failed_rollout is not None:
        rows.append(["rejected", f"generation {status.failed_rollout.generation}: {status.failed_rollout.reason}"])
    rows += [["incident", text] for text in status.incidents]
    lines = [*table_lines(rows), "", *table_lines([_HEADINGS, *map(_replica_row, status.replicas)])]
    events = read_events(store.events)[-LAST_EVENTS:]
    if events:
        lines += ["", f"last events (all: powerband events {store.name})", *table_lines(event_rows(events))]
    return lines


def promise_text(desired: ServiceSpec) -> str:
    slo, promise = SLO.from_dict(desired.release.plan["slo"]), desired.release.plan["promise"]
    return f"{slo} for {slo.attainment * 100:g} % of requests at {promise['rate']:.3g} a second"


def activity(replica: ReplicaStatus) -> str:
    """'ready', or 'starting (load 40%)'."""
    if replica.state == "starting" and replica.note:
        phase = replica.note.removeprefix("The engine is starting (").removesuffix(").")
        return f"starting ({phase})" if phase != replica.note else "starting"
    return replica.state


def _exited(replica: ReplicaStatus) -> ReplicaStatus:
    return msgspec.structs.replace(
        replica, state="exited", pid=0, ready_at=None, running=0, waiting=0, kv_usage=None, note=""
    )


def _replica_row(one: ReplicaStatus) -> Sequence[str]:
    has_exited = one.state == "exited"
    return [
        one.id,
        activity(one),
        str(one.pool),
        one.revision,
        "–" if has_exited else str(one.pid),
        one.url.rpartition(":")[2],
        str(one.running),
        str(one.waiting),
        "–" if one.kv_usage is None else f"{one.kv_usage:.0%}",
        "–" if has_exited else duration_text(time.time() - one.started_at),
        str(one.restarts),
    ]


def _state_text(store: ServiceStore, status: ServiceStatus) -> str:
    state = store.controller_state()
    if state == "alive":
        return status.phase
    age = duration_text(time.time() - status.at)
    if status.phase == "down":
        return f"down: none of its processes runs, last seen {age} ago; 'powerband deploy' starts it again"
    what = "its controller hangs" if state == "hung" else "no controller is alive"
    return f"{status.phase}; {what}, last seen {age} ago ('powerband deploy' starts another)"


def _attainment_text(desired: ServiceSpec, status: ServiceStatus) -> str:
    load = status.load
    if load.attainment is None:
        return "no requests yet"
    asked = desired.release.plan["slo"].get("attainment", 0.95)
    since = duration_text(time.time() - load.since)
    kept = f"{share_text(load.attainment)} of {count_text(load.scheduled, 'request')}"
    return f"{kept} since {since} ago, {asked * 100:g} % are promised"
