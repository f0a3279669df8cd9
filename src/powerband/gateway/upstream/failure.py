"""How a request to a replica can fail, and what each kind of failure means for the replica and for a retry."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum, auto

from powerband.dispatch.dispatcher import Outcome
from powerband.errors import PowerbandError


class FailureKind(Enum):
    CONNECTION = auto()  # connect timeout, reset, found dead or hung, or its engine died
    TIMEOUT = auto()
    INVALID_RESPONSE = auto()  # not HTTP, not what was requested, or cut off
    ERROR_RESPONSE = auto()  # an error about this request: the replica or the request is at fault, see `poison`
    REJECTED = auto()  # healthy, but at capacity (429, 503)
    UNAVAILABLE = auto()  # no server listens there, or its engine is gone: the request has not reached an engine
    UNAUTHORIZED = auto()  # it rejects the gateway's API key
    FORBIDDEN = auto()  # it serves others, but not this request: moderation, a model or an amount that is not allowed
    UNSUPPORTED = auto()  # it lacks the endpoint or the model
    GATEWAY_LIMIT = auto()  # the gateway has no file descriptor left


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """outcome: of the slot at the replica. counts: against the replica's circuit breaker and the tenant's retry budget.

    is_permanent: the replica would fail again, so only another one is tried. max_failures: how many of this kind one
    request may have.
    """

    outcome: Outcome
    counts: bool = True
    is_permanent: bool = False
    max_failures: int = sys.maxsize


# Failures that are not attempts have limits of their own: MAX_REJECTIONS, and `max_queue_wait_s` while unavailable.
POLICIES = {
    FailureKind.CONNECTION: FailurePolicy("failed"),
    FailureKind.TIMEOUT: FailurePolicy("failed"),
    FailureKind.INVALID_RESPONSE: FailurePolicy("failed"),
    FailureKind.ERROR_RESPONSE: FailurePolicy("unconfirmed"),
    FailureKind.REJECTED: FailurePolicy("rejected", counts=False),
    FailureKind.UNAVAILABLE: FailurePolicy("unavailable", counts=False),
    FailureKind.UNAUTHORIZED: FailurePolicy("failed", is_permanent=True),
    # Other replicas may belong to other providers, but one more is enough to tell.
    FailureKind.FORBIDDEN: FailurePolicy("cancelled", counts=False, is_permanent=True, max_failures=2),
    FailureKind.UNSUPPORTED: FailurePolicy("cancelled", counts=False, is_permanent=True),
    FailureKind.GATEWAY_LIMIT: FailurePolicy("cancelled", counts=False, is_permanent=True),
}

# All other codes come from the replica and are about this request.
_KINDS = {
    "connect": FailureKind.CONNECTION,
    "reset": FailureKind.CONNECTION,
    "lost": FailureKind.CONNECTION,
    "engine_dead": FailureKind.CONNECTION,
    "starting": FailureKind.CONNECTION,
    "timeout": FailureKind.TIMEOUT,
    "garbage": FailureKind.INVALID_RESPONSE,
    "truncated": FailureKind.INVALID_RESPONSE,
    "too_large": FailureKind.INVALID_RESPONSE,
    "resume": FailureKind.INVALID_RESPONSE,
}


class UpstreamFailure(ConnectionError):
    """A replica did not respond, or not completely. `code`: the error code in records and metrics.

    kind: by default as its code says. retry_after_s: the replica's Retry-After. client_error: what the client gets if
    no other replica takes the request; None: an error of the gateway.
    """

    def __init__(
        self,
        code: str,
        message: str,
        kind: FailureKind | None = None,
        *,
        retry_after_s: float | None = None,
        client_error: PowerbandError | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.kind = kind or _KINDS.get(code, FailureKind.ERROR_RESPONSE)
        self.retry_after_s = retry_after_s
        self.client_error = client_error

    @property
    def policy(self) -> FailurePolicy:
        return POLICIES[self.kind]

    @classmethod
    def invalid(cls, problem: Exception) -> UpstreamFailure:
        return cls("garbage", f"The replica's response is not what was asked for: {problem}.")
