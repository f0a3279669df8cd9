"""What a replica's own failures say: the circuit breaker of one replica, and the budget of second attempts.

closed ── failures in a row, or too large a share of them ──► open ── its time is over ──► half-open
   ▲                                                           ▲                              │ one request
   └───────────────────────── it succeeds ─────────────────────┴────────── it fails ──────────┘
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

from powerband.gateway.pool_options import PoolOptions


class Breaker:
    """`is_closed`: nothing is held against the replica. `ejections`: times that it opened."""

    def __init__(self, options: PoolOptions) -> None:
        self.is_closed = True
        self.ejections = 0
        self.open_until_s = 0.0
        self._options = options
        self._in_a_row = 0
        self._ended: deque[tuple[float, bool]] = deque()
        self._failed = 0  # of those
        self._doublings = 0
        self._is_trying = False

    def allows(self, now_s: float) -> bool:
        """Half-open, it lets one request through."""
        return self.is_closed or (now_s >= self.open_until_s and not self._is_trying)

    def sent(self) -> bool:
        """A request goes to the replica. Whether it is the one that tries it out."""
        self._is_trying = not self.is_closed
        return self._is_trying

    def ended(self, now_s: float, is_ok: bool | None, *, is_trial: bool, may_open: bool) -> None:
        """A request was answered, or failed through the replica's fault; None: neither, its client left.

        may_open: there are enough others. What was sent before the breaker opened says nothing new.
        """
        if is_trial:
            self._is_trying = False
            if is_ok is not None and not self.is_closed:
                self._close(now_s) if is_ok else self._open(now_s)
        elif self.is_closed and is_ok is not None:
            self._in_a_row = 0 if is_ok else self._in_a_row + 1
            self._remember(now_s, is_ok)
            if not is_ok and may_open and self._is_at_fault():
                self._open(now_s)

    def trip(self, now_s: float) -> None:
        """Open, whatever was counted."""
        self._is_trying = False
        self._open(now_s)

    def reset(self) -> None:
        """The replica is another process now."""
        self.is_closed, self._is_trying, self._doublings = True, False, 0
        self._forget()

    def _open(self, now_s: float) -> None:
        options = self._options
        if self.ejections and now_s - self.open_until_s > options.longest_eject_s:
            self._doublings = 0
        self.open_until_s = now_s + min(options.eject_s * 2**self._doublings, options.longest_eject_s)
        self._doublings = min(self._doublings + 1, 16)
        self.ejections += 1
        self.is_closed = False
        self._forget()

    def _close(self, now_s: float) -> None:
        self.is_closed = True
        self.open_until_s = now_s

    def _forget(self) -> None:
        self._ended.clear()
        self._failed = self._in_a_row = 0

    def _remember(self, now_s: float, is_ok: bool) -> None:
        self._ended.append((now_s, is_ok))
        self._failed += not is_ok
        while self._ended and (self._ended[0][0] < now_s - self._options.eject_window_s or len(self._ended) > 100):
            self._failed -= not self._ended.popleft()[1]

    def _is_at_fault(self) -> bool:
        options, total = self._options, len(self._ended)
        is_share = total >= options.eject_after_requests and self._failed >= options.eject_after_share * total
        return self._in_a_row >= options.eject_after_failures or is_share


class RetryBudget:
    """Second attempts must not become the load: a share of what is live, and a few in any case, in each window."""

    def __init__(self, options: PoolOptions) -> None:
        self.taken = 0  # since the start
        self._options = options
        self._times_s: deque[float] = deque()

    def is_unused(self, now_s: float) -> bool:
        """Whether nothing was taken in the window before `now_s`."""
        return not self._times_s or self._times_s[-1] <= now_s - self._options.retry_window_s

    def take(self, now_s: float, live: int) -> bool:
        options, times_s = self._options, self._times_s
        while times_s and times_s[0] <= now_s - options.retry_window_s:
            times_s.popleft()
        if len(times_s) >= max(options.fewest_retries, options.retry_share * live):
            return False
        times_s.append(now_s)
        self.taken += 1
        return True


class RetryBudgets:
    """A budget for each of several owners, so that nobody's failures use up another's second attempts."""

    def __init__(self, options: PoolOptions) -> None:
        self.taken = 0  # since the start, by all
        self._options = options
        self._budgets: dict[Hashable, RetryBudget] = {}

    def take(self, now_s: float, live: int, owner: Hashable) -> bool:
        """live: requests of this owner."""
        if owner not in self._budgets:
            for idle in [one for one, budget in self._budgets.items() if budget.is_unused(now_s)]:
                del self._budgets[idle]
            self._budgets[owner] = RetryBudget(self._options)
        is_taken = self._budgets[owner].take(now_s, live)
        self.taken += is_taken
        return is_taken
