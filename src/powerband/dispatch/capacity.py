"""How fast backends answer, measured while requests wait for them, and how long a new request would therefore wait.

measured, while requests wait      ended / second                     once that was for as long as a request takes
from what a request takes          in flight / seconds of one         Little's law; once a few have ended
the plan's                         its requests / second              before that

A request counts with the tokens that it may take at most, both when it ends and when it is ahead of another. Clients
name that limit, so requests that are ahead count at least an eighth of as many usual requests, and at most eight times
as many.
"""

from __future__ import annotations

import math

_MEMORY_S = 15.0  # of saturated time: what is older counts less and less
_MIN_ENDED = 8  # requests, before a measurement is used
_MAX_FACTOR = 8  # by which requests that are ahead count more, or less, than as many usual ones
_WEIGHT = 0.05  # of the newest in a moving mean
MAX_RETRY_AFTER_S = 60.0
DEFAULT_RETRY_AFTER_S = 1.0


class Capacity:
    """Of the backends of one length pool. planned: requests a second of one backend; None: not known."""

    def __init__(self) -> None:
        self.planned: float | None = None
        self._backend_s = 0.0  # time with requests waiting, times backends ready
        self._ended = 0.0  # requests in that time, those long ago counting less
        self._seen_s: float | None = None
        self._is_saturated = False
        self._ready, self._live = 0, 0
        self._num_ended = 0
        self._tokens = 0.0  # of a usual request
        self._seconds = 0.0  # that a usual request takes
        self._refused = 0.0  # without a dispatch since: they stand in an imagined line

    def observe(self, now_s: float, is_saturated: bool, ready: int, live: int) -> None:
        """The state from now on. ready: backends that take requests. live: requests in flight there."""
        if self._is_saturated and self._ready and self._seen_s is not None and now_s > self._seen_s:
            past_s = now_s - self._seen_s
            left = math.exp(-past_s / _MEMORY_S)
            self._backend_s = self._backend_s * left + past_s * self._ready
            self._ended *= left
        self._seen_s, self._is_saturated, self._ready, self._live = now_s, is_saturated, ready, live

    def ended(self, tokens: int, seconds: float) -> None:
        """A request of so many tokens at most ended, so many seconds after it was sent."""
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
        if self._ended >= _MIN_ENDED and 0 < self._backend_s >= self._seconds * self._ready:
            return self._ended / self._backend_s * self._ready
        if self._num_ended >= _MIN_ENDED and self._live and self._seconds > 0:
            return self._live / self._seconds
        return self.planned * self._ready if self.planned else None

    def wait_s(self, tokens: float, requests: float) -> float | None:
        """Until requests with so many tokens in all are dispatched. None: unknown."""
        rate = self.requests_per_s
        if rate is None:
            return None
        weight = tokens / self._tokens if self._num_ended >= _MIN_ENDED and self._tokens else requests
        return min(max(weight, requests / _MAX_FACTOR), requests * _MAX_FACTOR) / rate

    def retry_after_s(self, until_room_s: float | None) -> float:
        """When to come back: after the clients that were refused before."""
        self._refused += 1
        rate = self.requests_per_s
        line_s = DEFAULT_RETRY_AFTER_S if rate is None else self._refused / rate
        return min(max((until_room_s or 0.0) + line_s, DEFAULT_RETRY_AFTER_S), MAX_RETRY_AFTER_S)


class ServiceTime:
    """Seconds from dispatch to first token: moving mean, and mean deviation from it."""

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
        """Most requests take less."""
        return self.mean_s + self._spread_s
