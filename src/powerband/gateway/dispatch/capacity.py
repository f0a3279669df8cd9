"""How fast replicas answer, measured while requests wait for them, and how long a new one would therefore wait.

measured, while requests wait      ended / second                     when as long as a request takes was looked at
from what a request takes          in flight / seconds of one         Little's law; once a few have ended
the plan's                         its requests / second              before that

A request weighs what it may take at most, as it did when it queued: what ends and what is ahead are counted alike. But
what a request may take is what its client writes, so that what is ahead weighs an eighth of as many usual requests at
least, and eight times as many at most.
"""

from __future__ import annotations

import math

_MEMORY_S = 15.0  # of saturated time: what is older counts less and less
_FEWEST = 8  # requests that must have ended before a measurement is believed
_MOST_TIMES = 8  # that what is ahead may weigh more, or less, than as many usual requests
_WEIGHT = 0.05  # of the newest in a moving mean
LONGEST_RETRY_S = 60.0
UNKNOWN_RETRY_S = 1.0


class Capacity:
    """Of the replicas of one lane. planned: requests a second of one replica; None: not known."""

    def __init__(self) -> None:
        self.planned: float | None = None
        self._replica_s = 0.0  # time with requests waiting, times replicas ready
        self._ended = 0.0  # requests in that time, those long ago counting less
        self._seen_s: float | None = None
        self._is_saturated = False
        self._ready, self._live = 0, 0
        self._num_ended = 0
        self._tokens = 0.0  # of one request, usually
        self._seconds = 0.0  # that one takes, usually
        self._refused = 0.0  # that nothing was dispatched for since: they stand in an imagined line

    def observe(self, now_s: float, is_saturated: bool, ready: int, live: int) -> None:
        """How it is from now on. ready: replicas that take requests. live: requests that they have."""
        if self._is_saturated and self._ready and self._seen_s is not None and now_s > self._seen_s:
            past_s = now_s - self._seen_s
            left = math.exp(-past_s / _MEMORY_S)
            self._replica_s = self._replica_s * left + past_s * self._ready
            self._ended *= left
        self._seen_s, self._is_saturated, self._ready, self._live = now_s, is_saturated, ready, live

    def ended(self, tokens: int, seconds: float) -> None:
        """A request gave its place back, so many seconds after it got it."""
        self._num_ended += 1
        weight = max(_WEIGHT, 1 / self._num_ended)
        self._tokens += (tokens - self._tokens) * weight
        self._seconds += (seconds - self._seconds) * weight
        if self._is_saturated:
            self._ended += 1

    def dispatched(self) -> None:
        self._refused = max(self._refused - 1, 0.0)

    @property
    def requests_per_s(self) -> float | None:
        if not self._ready:
            return None
        if self._ended >= _FEWEST and 0 < self._replica_s >= self._seconds * self._ready:
            return self._ended / self._replica_s * self._ready
        if self._num_ended >= _FEWEST and self._live and self._seconds > 0:
            return self._live / self._seconds
        return self.planned * self._ready if self.planned else None

    def wait_s(self, tokens: float, requests: float) -> float | None:
        """Until so much is dispatched; requests: how many they are. None: unknown."""
        rate = self.requests_per_s
        if rate is None:
            return None
        weight = tokens / self._tokens if self._num_ended >= _FEWEST and self._tokens else requests
        return min(max(weight, requests / _MOST_TIMES), requests * _MOST_TIMES) / rate

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
        self.mean_s += error_s * _WEIGHT
        self._spread_s += (abs(error_s) - self._spread_s) * _WEIGHT

    @property
    def bound_s(self) -> float:
        """What most stay below."""
        return self.mean_s + self._spread_s
