"""The status of a service, as its controller last observed it (status.json, `powerband status --json`).

`name=` keeps the field names of the file. Times are seconds of time.time().
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

# 'down' and 'exited' are what commands show where no controller is alive; the file does not hold them.
ServicePhase = Literal["starting", "ready", "degraded", "rolling", "failed", "removing", "removed", "down"]
GatewayPhase = Literal["starting", "ready", "down"]
ReplicaPhase = Literal["starting", "ready", "unready", "draining", "drained", "stopping", "exited"]


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    pool: int
    revision: str
    state: ReplicaPhase
    pid: int
    url: str
    started_at: float
    ready_at: float | None = None
    running: int = 0  # requests
    waiting: int = 0  # requests
    kv_usage: float | None = None  # fraction of its KV cache
    restarts: int = 0  # crashes of it and of the replicas whose place it took
    note: str = ""  # why it is not ready


class GatewayStatus(msgspec.Struct, frozen=True, kw_only=True):
    state: GatewayPhase
    url: str
    pid: int = 0
    started_at: float = 0.0
    ready_at: float | None = None
    restarts: int = 0
    note: str = ""


class ServiceLoad(msgspec.Struct, frozen=True, kw_only=True):
    requests_per_s: float = 0.0  # over the last minute
    running: int = 0
    queued: int = 0
    scheduled: int = 0  # requests that count towards the SLO, since `since`
    good: int = 0  # of these, the ones that met it
    since: float = 0.0
    plan: str = ""  # digest of the plan whose requests are counted
    next_record: int = 0  # number of the gateway's first record that was not counted yet

    @property
    def attainment(self) -> float | None:
        """Fraction of requests that met the SLO; None: there were no requests."""
        return self.good / self.scheduled if self.scheduled else None


class FailedRollout(msgspec.Struct, frozen=True, kw_only=True):
    """A generation that did not become ready."""

    generation: int
    reason: str = msgspec.field(name="why")
    replica: str = ""
    log: str = ""  # the end of the replica's log
    exit_code: int | None = None


class ServiceStatus(msgspec.Struct, frozen=True, kw_only=True):
    at: float
    pid: int  # of the controller
    generation: int  # of the spec that was observed
    phase: ServicePhase
    revision: str  # of the release that runs
    gateway: GatewayStatus
    replicas: tuple[ReplicaStatus, ...] = ()
    last_ready_generation: int = msgspec.field(default=0, name="established")  # whose replicas were all ready
    failed_rollout: FailedRollout | None = msgspec.field(default=None, name="rejected")
    load: ServiceLoad = ServiceLoad()
    notes: tuple[str, ...] = ()
    incidents: tuple[str, ...] = ()  # the open ones, one sentence each
    monitor: dict[str, Any] = msgspec.field(default_factory=dict, name="watcher")  # Monitor.report()

    def has_failed(self, generation: int) -> bool:
        return self.failed_rollout is not None and self.failed_rollout.generation == generation
