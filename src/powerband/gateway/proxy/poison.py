"""Detects poison requests: when a replica answers a request with an error, is the request or the replica at fault?

One replica that fails may be broken. If two fail with the same request in the same way, the request is at fault.

    A: 500 not_finite ── suspected ──┬── B: 200             A is at fault: counts for its circuit breaker
                                     ├── B: 500 not_finite  the request is at fault: nothing counts, no more attempts
                                     ├── all attempts fail  all replicas are at fault, each in its own way
                                     └── no other attempt   nothing counts: the client left, or may not retry
"""

from __future__ import annotations

from powerband.gateway.dispatch.pool import Lease

# Codes of broken connections, dead engines and other failures that can affect any request. All other codes come from
# the replica and are about this request.
_NOT_ANSWERS = frozenset(
    ("connect", "reset", "lost", "timeout", "garbage", "truncated", "too_large", "resume", "engine_dead", "starting")
)


class PoisonDetector:
    """Judges the attempts of one request."""

    def __init__(self) -> None:
        self._suspected: list[tuple[Lease, str]] = []

    def failed(self, lease: Lease, code: str) -> bool:
        """An attempt failed: closes its lease, and returns whether the request is at fault."""
        if code in _NOT_ANSWERS:
            lease.close("failed")
            return False
        lease.close("suspected")
        is_poison = any(code == other and lease.replica.id != one.replica.id for one, other in self._suspected)
        self._suspected.append((lease, code))
        if is_poison:
            self._suspected.clear()
        return is_poison

    def settle(self) -> None:
        """Another replica succeeded, or all attempts have failed: every suspected replica was at fault."""
        for lease, _ in self._suspected:
            lease.blame()
        self._suspected.clear()
