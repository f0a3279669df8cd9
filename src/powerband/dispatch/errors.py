"""Errors with which a dispatcher rejects a request. All are 503 with a Retry-After; 429 is for a key's limits."""

from __future__ import annotations

from powerband.errors import PowerbandError


class PoolError(PowerbandError):
    http_status = 503

    def __init__(self, message: str, *, retry_after_s: float, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class PoolFull(PoolError):
    """The queue is full, or the predicted wait exceeds `max_queue_wait_s`."""

    default_code = "pool_full"


class DeadlineUnreachable(PoolError):
    """The first token cannot come by the request's deadline."""

    default_code = "deadline_infeasible"


class QueueTimeout(PoolError):
    """No replica became available by the request's deadline, or within `max_queue_wait_s`."""

    default_code = "queue_timeout"


class NoReplicaAvailable(PoolError):
    """No replica is ready, and none is expected to be."""

    default_code = "no_replica"


class ReplicasBusy(PoolError):
    """Every replica has rejected requests with a long Retry-After."""

    default_code = "replicas_busy"
