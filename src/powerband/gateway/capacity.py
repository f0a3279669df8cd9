"""How fast a pool answers, measured while requests wait for it, and how long a new one would therefore wait.

Tokens are counted as they were when the request queued (what it may take at most), so that what is measured and what is
ahead are counted alike. Before anything was measured the plan's requests a second count.
"""

from __future__ import annotations

import math

_MEMORY_S = 15.0  # of saturated time: what is older counts less and less
_FEWEST = 8  # requests that must have ended before the measured rate is believed
_TTFT_WEIGHT = 0.05
LONGEST_RETRY_S = 60.0
UNKNOWN_RETRY_S = 1.0


class Capacity:
    """planned_rate: requests a second of all replicas together; None: not known."""

    def __init__(self) -> None:
        self.planned_rate: float | None = None
        self._replica_s = 0.0  # time with requests waiting, times replicas ready
        self._requests = 0.0
        self._tokens = 0.0
        self._seen_s: float | None = None
        self._is_saturated = False
        self._ready = 0
        self._known = 0
        self._refused = 0.0  # since when nothing was dispatched: they stand in an imagined line

    def observe(self, now_s: float, is_saturated: bool, ready: int, known: int) -> None:
        """How it is from now on. ready: replicas that take requests, of those that are known."""
        if self._is_saturated and self._seen_s is not None and now_s > self._seen_s:
            past_s = now_s - self._seen_s
            left = math.exp(-past_s / _MEMORY_S)
            self._replica_s = self._replica_s * left + past_s * max(self._ready, 1)
            self._requests *= left
            self._tokens *= left
        self._seen_s, self._is_saturated, self._ready, self._known = now_s, is_saturated, ready, known

    def ended(self, tokens: int) -> None:
        """A request gave its place back."""
        if self._is_saturated:
            self._requests += 1
            self._tokens += tokens

    def dispatched(self) -> None:
        self._refused = max(self._refused - 1, 0.0)

    @property
    def requests_per_s(self) -> float | None:
        if self._requests >= _FEWEST and self._replica_s > 0 and self._ready:
            return self._requests / self._replica_s * self._ready
        if self.planned_rate and self._ready:
            return self.planned_rate * self._ready / max(self._known, 1)
        return None

    def wait_s(self, tokens: float, requests: float) -> float | None:
        """Until so much is dispatched. requests: how many they are, for a rate that counts those. None: unknown."""
        if not tokens:
            return 0.0
        rate = self.requests_per_s
        if rate is None:
            return None
        if self._requests >= _FEWEST and self._tokens:
            return tokens / (rate * self._tokens / self._requests)
        return requests / rate

    def retry_after_s(self, until_room_s: float | None) -> float:
        """When to come back, at the end of the line of those who were told so before."""
        self._refused += 1
        rate = self.requests_per_s
        line_s = UNKNOWN_RETRY_S if rate is None else self._refused / rate
        return min(max((until_room_s or 0.0) + line_s, UNKNOWN_RETRY_S), LONGEST_RETRY_S)


class ServiceTime:
    """Seconds from dispatch to first token: the usual, and as much as it usually differs from that."""

    def __init__(self) -> None:
        self.mean_s = 0.0
        self._spread_s = 0.0

    def observe(self, seconds: float) -> None:
        if not self.mean_s:
            self.mean_s, self._spread_s = seconds, seconds / 2
            return
        error_s = seconds - self.mean_s
        self.mean_s += error_s * _TTFT_WEIGHT
        self._spread_s += (abs(error_s) - self._spread_s) * _TTFT_WEIGHT

    @property
    def bound_s(self) -> float:
        """What most stay below."""
        return self.mean_s + self._spread_s
