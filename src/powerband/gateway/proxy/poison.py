"""Detects poison requests: when a replica fails with a request, is the request or the replica at fault?

One replica that fails may be broken. If two fail with the same request in the same way, the request is at fault.

    A: 500 not_finite ── unconfirmed ┬── B: 200 and output  A is at fault: counts for its circuit breaker
                                     ├── B: 500 not_finite  the request is at fault: nothing counts, no more attempts
                                     ├── all attempts fail  all replicas are at fault, each in its own way
                                     └── no other attempt   nothing counts: the client left, or may not retry

A crash ends all requests in flight, and any of them may be the cause:

    A: crash ──► B: crash, alone there                      the request is at fault: no more attempts
    A: crash ──► B: crash, with others ──► quarantine ┬──── C: crash before the first token: the request is at fault
                                                      └──── C: output: another one was

In quarantine, a request starts at a replica where no other one in quarantine runs.
"""

from __future__ import annotations

from powerband.gateway.dispatch.pool import Lease

MAX_CRASHES = 4  # of replicas with one request in flight, whatever was the cause


class PoisonDetector:
    """Judges the attempts of one request."""

    def __init__(self) -> None:
        self._unconfirmed: list[tuple[Lease, str]] = []
        self.num_crashes = 0

    def record_failure(self, lease: Lease, code: str) -> bool:
        """A replica reported an error, so its lease was closed as "unconfirmed". Returns whether the request is
        at fault.
        """
        is_poison = any(code == other and lease.replica.id != one.replica.id for one, other in self._unconfirmed)
        self._unconfirmed.append((lease, code))
        if is_poison:
            self._unconfirmed.clear()
        return is_poison

    def record_crash(self, lease: Lease) -> bool:
        """A replica's process or engine crashed or hung while it ran the request. Returns whether the request is at
        fault.
        """
        self.num_crashes += 1
        return self.num_crashes > 1 and (lease.was_alone or lease.was_quarantined)

    def confirm_failures(self) -> None:
        """Another replica succeeded, or all attempts have failed: every unconfirmed replica was at fault."""
        for lease, _ in self._unconfirmed:
            lease.confirm_failure()
        self._unconfirmed.clear()
