"""The throughput of backends, and the queueing time that a new request can expect from it.

source of the rate                       requests / second               used
completions while the queue is nonempty  completed / second              once measured for one mean request duration
Little's law                             in flight / mean duration       once a few requests have ended
the plan                                 the plan's rate                 before that

Each tenant also has estimates of its own: requests of one take 50 s, those of another 1 s. The fair queue serves a
tenant's requests at a rate of their own, however many others wait, so none is refused for what others' requests took.

A request is weighted by its maximum tokens, both when it ends and when it is ahead of another. Clients choose that
maximum, so N requests ahead count as at least N/8 and at most 8N average requests.
"""

from __future__ import annotations

import math
from collections import OrderedDict

_MEMORY_S = 15.0  # time constant of the exponential decay
_MIN_ENDED = 8  # completed requests before a measurement is used
_MAX_FACTOR = 8  # maximum weight, up or down, of requests ahead compared with average ones
_WEIGHT = 0.05  # of the newest in a moving mean
MAX_RETRY_AFTER_S = 60.0
DEFAULT_RETRY_AFTER_S = 1.0
_MAX_TENANTS = 4096  # whose estimates are kept


class Capacity:
    """The throughput of one length pool's backends, for all requests or for those of one tenant.

    planned: requests per second of one backend; None: unknown.
    """

    def __init__(self) -> None:
        self.planned: float | None = None
        self._backend_s = 0.0  # backend-seconds while saturated, decayed
        self._ended = 0.0  # requests completed in that time, decayed
        self._seen_s: float | None = None
        self._is_saturated = False
        self._ready, self._live = 0, 0
        self._num_ended = 0
        self._tokens = 0.0  # moving mean of the tokens of a request
        self._seconds = 0.0  # moving mean of the duration of a request
        self._num_rejected = 0.0  # rejected requests, less dispatches since: clients that will probably come back

    def observe(self, now_s: float, is_saturated: bool, ready: int, live: int) -> None:
        """Record the state from now on. ready: serving backends. live: their requests in flight."""
        if self._seen_s is not None and now_s > self._seen_s:
            past_s = now_s - self._seen_s
            left = math.exp(-past_s / _MEMORY_S)
            self._backend_s = self._backend_s * left + (past_s * self._ready if self._is_saturated else 0.0)
            self._ended *= left
        self._seen_s, self._is_saturated, self._ready, self._live = now_s, is_saturated, ready, live

    def ended(self, tokens: int, seconds: float) -> None:
        """A request ended. tokens: its upper bound. seconds: since it was sent."""
        self._num_ended += 1
        weight = max(_WEIGHT, 1 / self._num_ended)
        self._tokens += (tokens - self._tokens) * weight
        self._seconds += (seconds - self._seconds) * weight
        if self._is_saturated:
            self._ended += 1

    def dispatched(self) -> None:
        self._num_rejected = max(self._num_rejected - 1, 0.0)

    @property
    def requests_per_s(self) -> float | None:
        if not self._ready:
            return None
        if self._ended >= _MIN_ENDED and 0 < self._backend_s >= self._seconds * self._ready:
            return self._ended / self._backend_s * self._ready
        if self._num_ended >= _MIN_ENDED and self._live and self._seconds > 0:
            return self._live / self._seconds
        return self.planned * self._ready if self.planned else None

    def planned_wait_s(self, requests: float) -> float | None:
        """Seconds until this many requests are dispatched, according to the plan. None: unknown."""
        return requests / (self.planned * self._ready) if self.planned and self._ready else None

    def wait_s(self, tokens: float, requests: float) -> float | None:
        """Seconds until this many requests, with this many tokens in all, are dispatched. None: unknown."""
        rate = self.requests_per_s
        if rate is None:
            return None
        weight = tokens / self._tokens if self._num_ended >= _MIN_ENDED and self._tokens else requests
        return min(max(weight, requests / _MAX_FACTOR), requests * _MAX_FACTOR) / rate

    def retry_after_s(self, until_room_s: float | None) -> float:
        """Retry-After for a request that is rejected now: later than for earlier rejections, to spread the retries."""
        self._num_rejected += 1
        rate = self.requests_per_s
        line_s = DEFAULT_RETRY_AFTER_S if rate is None else self._num_rejected / rate
        return min(max((until_room_s or 0.0) + line_s, DEFAULT_RETRY_AFTER_S), MAX_RETRY_AFTER_S)


class TenantEstimates:
    """What one tenant's requests took."""

    __slots__ = ("capacity", "service")

    def __init__(self) -> None:
        self.capacity, self.service = Capacity(), ServiceTime()


class EstimatesByTenant:
    """Estimates of the tenants that sent requests last."""

    def __init__(self) -> None:
        self._estimates: OrderedDict[str, TenantEstimates] = OrderedDict()

    def __getitem__(self, tenant: str) -> TenantEstimates:
        estimates = self._estimates.get(tenant)
        if estimates is None:
            if len(self._estimates) >= _MAX_TENANTS:
                self._estimates.popitem(last=False)
            estimates = self._estimates[tenant] = TenantEstimates()
        else:
            self._estimates.move_to_end(tenant)
        return estimates


class ServiceTime:
    """Seconds from dispatch to first token: moving mean and mean absolute deviation."""

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
