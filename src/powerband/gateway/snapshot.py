"""The state of a pool at one moment, for /admin/routes, /metrics, readiness and the monitor. Plain values."""

from __future__ import annotations

from dataclasses import dataclass

from powerband.dispatch.backend import BackendState


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSnapshot:
    """A replica in its pool."""

    id: str
    state: BackendState
    inflight: int = 0  # requests that the gateway has sent and that have not ended
    running: int = 0  # requests, as the replica reports
    waiting: int = 0  # requests, as the replica reports
    kv_usage: float | None = None  # fraction of its KV cache
    silent_s: float = 0.0  # seconds since the last byte of its requests in flight; 0: none in flight
    ejected_for_s: float = 0.0  # seconds until the ejection ends
    ejections: int = 0
    last_errors: tuple[str, ...] = ()  # codes, newest last


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSnapshot:
    """The pool of one model."""

    model: str
    queued: int = 0  # requests
    queued_tokens: int = 0
    predicted_wait_s: float = 0.0  # of a request that arrives now
    retries: int = 0  # since the start
    replicas: tuple[ReplicaSnapshot, ...] = ()
