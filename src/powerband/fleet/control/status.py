"""Converts the controller's state to the status that `powerband status` shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from powerband.fleet.control.instance_specs import pool_revisions
from powerband.fleet.control.instance_state import InstanceState
from powerband.fleet.service.spec import Release, ServiceSpec
from powerband.fleet.service.status import GatewayStatus, ReplicaPhase, ReplicaStatus, ServicePhase
from powerband.gateway.snapshot import ReplicaSnapshot


def replica_status(state: InstanceState, load: ReplicaSnapshot | None, clock_offset_s: float) -> ReplicaStatus:
    """load: as the gateway reports it; None: it does not know the replica. clock_offset_s: from the controller's clock
    to time.time().
    """
    instance = state.instance
    return ReplicaStatus(
        id=instance.id,
        pool=instance.pool,
        revision=instance.revision,
        state=_phase(state),
        pid=instance.pid,
        url=instance.url,
        started_at=instance.started_at,
        ready_at=None if state.ready_s is None else state.ready_s + clock_offset_s,
        running=load.inflight if load is not None else 0,
        waiting=load.waiting if load is not None else 0,
        kv_usage=load.kv_usage if load is not None else None,
        restarts=state.restarts,
        note=state.probe.note,
    )


def _phase(state: InstanceState) -> ReplicaPhase:
    if state.phase != "ready":
        return state.phase
    if state.is_cordoned:
        return "drained"
    if state.is_draining:
        return "draining"
    return "ready" if state.is_healthy else "unready"


def service_phase(
    spec: ServiceSpec,
    release: Release | None,
    replicas: Sequence[ReplicaStatus],
    gateway: GatewayStatus,
    *,
    established: bool,
) -> ServicePhase:
    """release: the one in force; None: nothing is to run. established: everything has been ready before."""
    if spec.removed:
        return "removing" if replicas or gateway.state != "down" else "removed"
    if release is None:
        return "failed"
    revisions = set(enumerate(pool_revisions(release)))
    if established and any((one.pool, one.revision) not in revisions for one in replicas):
        return "rolling"
    serving = Counter((one.pool, one.revision) for one in replicas if one.state in ("ready", "drained"))
    is_missing = any(serving[pool, revision] < release.counts[pool] for pool, revision in revisions)
    if not is_missing and gateway.state == "ready":
        return "ready" if len(replicas) == sum(release.counts) else "rolling"
    if established:
        return "degraded"
    return "rolling" if spec.previous is not None else "starting"
