"""Outlier ejection: the circuit breaker of one backend, which counts its failed requests; and the retry budget.

closed ── consecutive failures, or a high error ratio ──► open ── ejection time ends ──► half-open
   ▲                                                       ▲                                 │ one trial request
   └─────────────────────── it succeeds ───────────────────┴──────────── it fails ───────────┘
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

from powerband.dispatch.options import DispatchOptions


class CircuitBreaker:
    """`is_closed`: requests go to the backend. `ejections`: how often it has opened."""

    def __init__(self, options: DispatchOptions) -> None:
        self.is_closed = True
        self.ejections = 0
        self.open_until_s = 0.0
        self._options = options
        self._num_failed_in_a_row = 0
        self._results: deque[tuple[float, bool]] = deque()
        self._num_failed = 0  # among `_results`
        self._backoff_exponent = 0
        self._is_trial_running = False

    def allows(self, now_s: float) -> bool:
        """Whether a request may be sent. Half-open, the breaker lets one request through."""
        return self.is_closed or (now_s >= self.open_until_s and not self._is_trial_running)

    def sent(self) -> bool:
        """A request is sent to the backend. Returns whether it is the trial request of a half-open breaker."""
        self._is_trial_running = not self.is_closed
        return self._is_trial_running

    def ended(self, now_s: float, is_ok: bool | None, *, is_trial: bool, may_open: bool) -> None:
        """A request ended. is_ok: True: it succeeded; False: the backend failed; None: neither (its client left).

        may_open: enough other backends are left. Requests sent before the breaker opened do not count.
        """
        if is_trial:
            self._is_trial_running = False
            if is_ok is not None and not self.is_closed:
                self._close(now_s) if is_ok else self._open(now_s)
        elif self.is_closed and is_ok is not None:
            self._num_failed_in_a_row = 0 if is_ok else self._num_failed_in_a_row + 1
            self._remember(now_s, is_ok)
            if not is_ok and may_open and self._is_at_fault():
                self._open(now_s)

    def force_open(self, now_s: float) -> None:
        """Open regardless of the counts."""
        self._is_trial_running = False
        self._open(now_s)

    def reset(self) -> None:
        """A new process has taken the backend's place."""
        self.is_closed, self._is_trial_running, self._backoff_exponent = True, False, 0
        self._forget()

    def _open(self, now_s: float) -> None:
        options = self._options
        if self.ejections and now_s - self.open_until_s > options.max_ejection_s:
            self._backoff_exponent = 0
        self.open_until_s = now_s + min(options.base_ejection_s * 2**self._backoff_exponent, options.max_ejection_s)
        self._backoff_exponent = min(self._backoff_exponent + 1, 16)
        self.ejections += 1
        self.is_closed = False
        self._forget()

    def _close(self, now_s: float) -> None:
        self.is_closed = True
        self.open_until_s = now_s

    def _forget(self) -> None:
        self._results.clear()
        self._num_failed = self._num_failed_in_a_row = 0

    def _remember(self, now_s: float, is_ok: bool) -> None:
        self._results.append((now_s, is_ok))
        self._num_failed += not is_ok
        while self._results and (
            self._results[0][0] < now_s - self._options.eject_window_s or len(self._results) > 100
        ):
            self._num_failed -= not self._results.popleft()[1]

    def _is_at_fault(self) -> bool:
        options, total = self._options, len(self._results)
        is_share = total >= options.eject_min_requests and self._num_failed >= options.eject_error_ratio * total
        return self._num_failed_in_a_row >= options.eject_after_failures or is_share


class RetryBudget:
    """Prevents retry storms: limits the retries in a window to a ratio of the live requests, or a few."""

    def __init__(self, options: DispatchOptions) -> None:
        self.taken = 0  # since the start
        self._options = options
        self._times_s: deque[float] = deque()

    def is_unused(self, now_s: float) -> bool:
        """Whether no retry was taken in the window before `now_s`."""
        return not self._times_s or self._times_s[-1] <= now_s - self._options.retry_window_s

    def take(self, now_s: float, live: int) -> bool:
        options, times_s = self._options, self._times_s
        while times_s and times_s[0] <= now_s - options.retry_window_s:
            times_s.popleft()
        if len(times_s) >= max(options.min_retries, options.retry_budget_ratio * live):
            return False
        times_s.append(now_s)
        self.taken += 1
        return True


class RetryBudgets:
    """One retry budget per owner, so that one owner's failures do not use up the retries of another."""

    def __init__(self, options: DispatchOptions) -> None:
        self.taken = 0  # since the start, by all
        self._options = options
        self._budgets: dict[Hashable, RetryBudget] = {}

    def take(self, now_s: float, live: int, owner: Hashable) -> bool:
        """Take a retry if the owner's budget allows it. live: the owner's requests in flight."""
        if owner not in self._budgets:
            for idle in [one for one, budget in self._budgets.items() if budget.is_unused(now_s)]:
                del self._budgets[idle]
            self._budgets[owner] = RetryBudget(self._options)
        is_taken = self._budgets[owner].take(now_s, live)
        self.taken += is_taken
        return is_taken
