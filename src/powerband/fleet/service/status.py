"""What a service is, as its controller last observed it. Stored in status.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

ServicePhase = Literal["starting", "ready", "degraded", "rolling", "failed", "removing", "removed"]
ReplicaPhase = Literal["starting", "ready", "unready", "draining", "drained", "stopping"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """running, waiting: requests. kv_usage: share of its KV cache. restarts: how often its place was filled anew."""

    id: str
    pool: int
    revision: str
    state: ReplicaPhase
    pid: int
    url: str
    started_at: float
    ready_at: float | None = None
    running: int = 0
    waiting: int = 0
    kv_usage: float | None = None
    restarts: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayStatus:
    state: Literal["starting", "ready", "down"]
    url: str
    pid: int = 0
    started_at: float = 0.0
    ready_at: float | None = None
    restarts: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLoad:
    """requests_per_s: of the last minute. attainment: of all requests since `since`; None: there were none."""

    requests_per_s: float = 0.0
    running: int = 0
    queued: int = 0
    scheduled: int = 0
    good: int = 0
    since: float = 0.0
    next_record: int = 0  # of the gateway's, that was not counted yet

    @property
    def attainment(self) -> float | None:
        return self.good / self.scheduled if self.scheduled else None


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedRollout:
    """A generation that did not become ready. log: the end of what its replica said."""

    generation: int
    why: str
    replica: str = ""
    log: str = ""
    exit_code: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What is, as the controller saw it at `at` (time.time()). established: the last generation that was all ready.
    incidents: the open ones, each in a sentence. watcher: Watcher.report().
    """

    at: float
    pid: int
    generation: int
    phase: ServicePhase
    revision: str
    gateway: GatewayStatus
    replicas: tuple[ReplicaStatus, ...] = ()
    established: int = 0
    rejected: FailedRollout | None = None
    load: ServiceLoad = field(default_factory=ServiceLoad)
    notes: tuple[str, ...] = ()
    incidents: tuple[str, ...] = ()
    watcher: dict[str, Any] = field(default_factory=dict)
