"""Why a pool does not take a request. All are 503 with a time to come back; 429 is for the limits of a key."""

from __future__ import annotations

from powerband.errors import PowerbandError


class Refusal(PowerbandError):
    http_status = 503

    def __init__(self, message: str, *, retry_after_s: float, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class PoolFull(Refusal):
    """As much waits as may, or the wait would be longer than anybody may wait."""

    default_code = "pool_full"


class DeadlineInfeasible(Refusal):
    """The first token cannot come by the request's deadline."""

    default_code = "deadline_infeasible"


class Expired(Refusal):
    """It has waited in vain until its deadline, or as long as anybody may."""

    default_code = "queue_timeout"


class NoReplica(Refusal):
    """None is ready, and none is expected to be."""

    default_code = "no_replica"


class ReplicasBusy(Refusal):
    """Every replica has asked to be left alone for a while (Retry-After)."""

    default_code = "replicas_busy"
