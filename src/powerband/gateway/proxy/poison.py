"""Whose fault it is that a replica answers a request with an error of its own: poison, or a broken replica?

One replica that fails may be broken. Two that fail with the same request in the same way are not: the request is.

    A: 500 not_finite ── suspected ──┬── B: 200             A is at fault: counts for its breaker
                                     ├── B: 500 not_finite  the request is: nothing counts, and no other is tried
                                     ├── all tries fail     all of them are at fault, each in its own way
                                     └── no other answer    nothing counts: a client that leaves proves nothing
"""

from __future__ import annotations

from powerband.gateway.dispatch.pool import Lease

# What a connection's end or a dead engine is called, and what can strike any request. All other codes are a replica's
# own words about this one.
_NOT_ANSWERS = frozenset(
    ("connect", "reset", "lost", "timeout", "garbage", "truncated", "too_large", "resume", "engine_dead", "starting")
)


class PoisonDetector:
    """Of one request's tries."""

    def __init__(self) -> None:
        self._suspected: list[tuple[Lease, str]] = []

    def failed(self, lease: Lease, code: str) -> bool:
        """A try failed: its lease is closed here. True: the request is at fault."""
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
        """Another replica answers, or all tries have failed: every suspected replica was at fault."""
        for lease, _ in self._suspected:
            lease.blame()
        self._suspected.clear()
