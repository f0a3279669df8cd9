"""From what a controller knows to what `powerband status` shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from powerband.fleet.control.instance_specs import pool_revisions
from powerband.fleet.control.probes import ProbeResult
from powerband.fleet.control.replica_state import ReplicaState
from powerband.fleet.service.spec import Desired, Release
from powerband.fleet.service.status import GatewayStatus, ReplicaPhase, ReplicaStatus, ServicePhase
from powerband.gateway.snapshot import ReplicaSnapshot


def replica_status(
    known: ReplicaState,
    sight: ProbeResult,
    heard: ReplicaSnapshot | None,
    *,
    set_aside: bool,
    now_s: float,
    clock_offset_s: float,
) -> ReplicaStatus:
    """clock_offset_s: time.time() less the controller's clock."""
    running = known.running
    return ReplicaStatus(
        id=running.id,
        pool=running.pool,
        revision=running.revision,
        state=_state(known, sight, set_aside=set_aside, now_s=now_s),
        pid=running.pid,
        url=running.url,
        started_at=running.started_at,
        ready_at=None if known.ready_s is None else known.ready_s + clock_offset_s,
        running=heard.inflight if heard is not None else 0,
        waiting=heard.waiting if heard is not None else 0,
        kv_usage=heard.kv_usage if heard is not None else None,
        restarts=known.restarts,
        note=known.note,
    )


def _state(known: ReplicaState, sight: ProbeResult, *, set_aside: bool, now_s: float) -> ReplicaPhase:
    if known.running.stopping:
        return "stopping"
    if known.ready_s is None:
        return "starting"
    if set_aside:
        return "drained"
    if known.draining_s is not None:
        return "draining"
    return "ready" if known.is_well(sight, now_s) else "unready"


def service_phase(
    desired: Desired,
    release: Release | None,
    replicas: Sequence[ReplicaStatus],
    gateway: GatewayStatus,
    *,
    established: bool,
) -> ServicePhase:
    """In a word. release: what is to run now; None: nothing. established: it was all ready before."""
    if desired.removed:
        return "removing" if replicas or gateway.state != "down" else "removed"
    if release is None:
        return "failed"
    revisions = set(enumerate(pool_revisions(release)))
    if established and any((one.pool, one.revision) not in revisions for one in replicas):
        return "rolling"
    serving = Counter((one.pool, one.revision) for one in replicas if one.state in ("ready", "drained"))
    missing = [pool for pool, revision in revisions if serving[pool, revision] < release.counts[pool]]
    if not missing and gateway.state == "ready":
        return "ready" if len(replicas) == sum(release.counts) else "rolling"
    if established:
        return "degraded"
    return "rolling" if desired.previous is not None else "starting"
