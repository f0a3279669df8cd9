"""What a pool says of itself at one moment, for /admin/routes, /metrics, readiness and the watcher. Plain values."""

from __future__ import annotations

from dataclasses import dataclass

from powerband.dispatch.backend import BackendState


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSnapshot:
    """state: see dispatch.backend. running, waiting: requests, as the replica reports where it does. inflight: requests
    that the gateway has sent and that have not ended. silent_s: seconds since a byte of any of those came; 0 when there
    are none. ejected_for_s: seconds that it stays ejected. last_errors: codes, newest last.
    """

    id: str
    state: BackendState
    inflight: int = 0
    running: int = 0
    waiting: int = 0
    kv_usage: float | None = None
    silent_s: float = 0.0
    ejected_for_s: float = 0.0
    ejections: int = 0
    last_errors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSnapshot:
    """queued: requests that wait here. predicted_wait_s: of a request that came now. retries: since the start."""

    model: str
    queued: int = 0
    queued_tokens: int = 0
    predicted_wait_s: float = 0.0
    retries: int = 0
    replicas: tuple[ReplicaSnapshot, ...] = ()
