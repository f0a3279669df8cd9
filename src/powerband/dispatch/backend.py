"""One replica as its dispatcher sees it: requests in flight, health, and how many more requests it can take.

starting ── probe ok ──► ready ── `unhealthy_threshold` failed probes ──► ejected ── `healthy_threshold` ok ──► ready
                           └── failed requests, or a hang ──► open (see breaker) ──► ready
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from powerband.dispatch.breaker import CircuitBreaker
from powerband.dispatch.options import DispatchOptions
from powerband.dispatch.rejection import RejectionBackoff
from powerband.dispatch.request import DispatchRequest, PriorityLevel

# ready: gets requests. starting: no probe has succeeded yet. ejected: probes found it unhealthy. open: its circuit
# breaker is open. draining: finishes its running requests and gets no new ones.
BackendState = Literal["ready", "starting", "ejected", "open", "draining"]
BACKEND_STATES: tuple[BackendState, ...] = get_args(BackendState)

_GAP_WEIGHT = 0.02  # of the newest gap in the moving mean
_PROVEN_S = 10.0
_FULL = 0.95  # fraction of the KV cache
_TOGETHER_S = 1.0  # requests that fail within this time of each other were in flight at the same crash
_LOG_INTERVAL_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSpec:
    """A replica that requests may go to. id: unique, never reused for another process."""

    id: str
    max_num_seqs: int = 256  # requests that it runs at once
    weight: float = 1.0  # its relative share of the requests, with weighted routing
    max_prompt_tokens: int | None = None  # longest prompt that it accepts; None: any
    draining: bool = False  # finishes its running requests and gets no new ones


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """What a replica's metrics report. None: the replica does not report this."""

    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None  # fraction of the KV cache, 0 to 1
    tokens: float | None = None  # prompt and output tokens computed since the engine started


class InFlightRequest:
    """A request that was sent to a backend and has not ended."""

    # fmt: off
    __slots__ = (
        "backend",
        "began_s",
        "bytes_s",
        "has_first_token",
        "is_lost",
        "is_released",
        "is_trial",
        "is_unconfirmed",
        "level",
        "on_lost",
        "outstanding",
        "prompt_tokens",
        "queue_s",
        "read_since_s",
        "request",
        "sent_s",
        "settle",
        "tokens",
        "was_alone",
    )
    # fmt: on

    def __init__(
        self,
        backend: Backend,
        request: DispatchRequest,
        level: PriorityLevel,
        now_s: float,
        settle: Callable[[float], None],
    ) -> None:
        """settle: called when the request ends, with the tokens to charge to its tenant."""
        self.backend, self.request, self.level, self.sent_s, self.settle = backend, request, level, now_s, settle
        self.queue_s = 0.0
        self.prompt_tokens = request.prompt_tokens
        self.tokens = request.prompt_tokens + request.output_tokens  # upper bound
        self.outstanding = self.tokens  # its current part of `Backend.outstanding`
        self.is_trial = backend.breaker.sent()
        self.began_s: float | None = None  # when its first byte came
        self.bytes_s = now_s  # when its last byte came
        self.read_since_s: float | None = now_s  # None: reading is paused because the client is slow
        self.has_first_token = False
        self.is_released = False
        self.is_unconfirmed = False  # released as "unconfirmed": the request itself may be at fault
        self.is_lost = False  # the backend is dead or hung: no more data will come
        self.was_alone = False  # it failed, and no other request was in flight at its backend
        self.on_lost: Callable[[], None] | None = None

    @property
    def tenant(self) -> str:
        return self.request.tenant

    def mark_lost(self) -> None:
        self.is_lost = True
        callback, self.on_lost = self.on_lost, None
        if callback is not None:
            callback()


class Backend:
    """`limit`: maximum requests in flight. `outstanding`: upper bound of the tokens that those still need."""

    def __init__(self, spec: BackendSpec, options: DispatchOptions, now_s: float) -> None:
        self.spec = spec
        self.options = options
        self.breaker = CircuitBreaker(options)
        self.backoff = RejectionBackoff()
        self.in_flight: set[InFlightRequest] = set()
        self.outstanding = 0
        self.sent_tokens = 0.0  # since the start, for weighted routing
        self.turn = 0  # number of the last dispatch to it, to break ties
        self.is_ready = False
        self.is_removed = False
        self.was_ready = False
        self.since_s = now_s  # when `is_ready` last changed
        self.logged_s = -_LOG_INTERVAL_S
        self.limit = self.max_in_flight
        self.load = ReplicaLoad()
        self.gap_s = 0.0  # moving mean of the time between two reads of one stream
        self.bytes_s = now_s
        self.probed_s = -math.inf  # when a probe last succeeded
        self.last_success_s = -math.inf  # when it last completed a request
        self.restarts: int | None = None
        self.errors: deque[str] = deque(maxlen=5)
        self.ejections = 0  # by failed probes
        self.ejected_until_s = 0.0
        self._restarted_s = -math.inf
        self._failed_s = -math.inf  # when a request last failed
        self._num_bad, self._num_good = 0, 0  # consecutive failed and successful probes
        self._num_accepted = 0  # the most requests in flight when it accepted one …
        self._accepted_s = -math.inf  # … which counts for `_PROVEN_S`
        self._num_series = 0  # ejections in close succession, for the exponential backoff
        self._num_crowded = 0  # consecutive load reports with too many waiting requests

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def max_num_seqs(self) -> int:
        return self.spec.max_num_seqs

    @property
    def max_in_flight(self) -> int:
        return self.spec.max_num_seqs + self.options.max_waiting_per_replica

    @property
    def is_serving(self) -> bool:
        """Whether requests go to it, now or as soon as it has capacity."""
        return self.is_ready and not self.spec.draining and not self.is_removed

    def has_capacity(self, now_s: float) -> bool:
        return (
            len(self.in_flight) < self.limit
            and self.backoff.allows(now_s, self.in_flight)
            and (self.breaker.is_closed or self.breaker.allows(now_s))
        )

    @property
    def state(self) -> BackendState:
        if self.spec.draining or self.is_removed:
            return "draining"
        if not self.is_ready:
            return "ejected" if self.was_ready else "starting"
        return "ready" if self.breaker.is_closed else "open"

    def may_log(self, now_s: float) -> bool:
        """Whether another log line about its responses is due: each request may hit the same fault."""
        if now_s - self.logged_s < _LOG_INTERVAL_S:
            return False
        self.logged_s = now_s
        return True

    # What probes report.

    def probe_succeeded(self, now_s: float, *, is_needed: bool = False) -> bool:
        """A probe succeeded. Returns whether the backend becomes ready.

        is_needed: no other backend is ready, so an unstable one is readmitted early.
        """
        self.probed_s = now_s
        self._num_bad = 0
        self._num_good += 1
        is_early = now_s < self.ejected_until_s and not is_needed
        if self.is_ready or (self.was_ready and (self._num_good < self.options.healthy_threshold or is_early)):
            return False
        self.is_ready = self.was_ready = True
        self.since_s = now_s
        return True

    @property
    def alive_s(self) -> float:
        """When it last sent bytes or passed a probe."""
        return max(self.bytes_s, self.probed_s)

    @property
    def is_in_doubt(self) -> bool:
        """Whether it is ready although its last probe failed."""
        return self.is_ready and self._num_bad > 0

    def probe_failed(self, now_s: float, code: str) -> bool:
        """A probe failed. Returns whether the backend is ejected."""
        self._num_good = 0
        self._num_bad += 1
        if not self.errors or self.errors[-1] != code:
            self.errors.append(code)
        return self.is_ready and self._num_bad >= self.options.unhealthy_threshold and self._eject(now_s)

    def mark_unavailable(self, now_s: float, code: str) -> bool:
        """A request was refused a connection, or the engine is gone: counts as `unhealthy_threshold` failed probes.

        Returns whether the backend is ejected.
        """
        self._num_bad = max(self._num_bad, self.options.unhealthy_threshold - 1)
        return self.probe_failed(now_s, code)

    def _eject(self, now_s: float) -> bool:
        self.is_ready = False
        self.ejections += 1
        self._num_series = 1 if now_s - self.since_s > self.options.max_ejection_s else self._num_series + 1
        if self._num_series > 1:  # after the first ejection, it returns as soon as it is healthy
            out_s = self.options.base_ejection_s * 2.0 ** min(self._num_series - 2, 16)
            self.ejected_until_s = now_s + min(out_s, self.options.max_ejection_s)
        self.since_s = now_s
        return True

    def fail_in_flight(self) -> None:
        """The backend is dead or hung: fail all requests in flight."""
        for in_flight in tuple(self.in_flight):
            in_flight.mark_lost()

    def restarted(self, now_s: float) -> None:
        """The engine has restarted. Its state is reset, unless it restarts again and again."""
        is_rare = now_s - self._restarted_s > self.options.max_ejection_s
        self._restarted_s = now_s
        if is_rare:
            self.replaced()

    def replaced(self) -> None:
        """A new process has taken its place: reset what was learned about the old one."""
        self.limit, self._num_crowded, self._num_accepted = self.max_in_flight, 0, 0
        self.backoff.reset()
        self.breaker.reset()

    # Requests sent to it.

    def sent(self, in_flight: InFlightRequest) -> None:
        self.backoff.sent(in_flight, self.in_flight)
        self.in_flight.add(in_flight)

    def rejected(self, in_flight: InFlightRequest, now_s: float, retry_after_s: float) -> None:
        """It rejected a request. retry_after_s: its Retry-After; 0: none.

        It may be at capacity, so `limit` falls to what it still runs, but not below what it accepted a moment ago: then
        the rejection concerns the request or its tenant.
        """
        if retry_after_s and self.backoff.ignores(in_flight.tenant, now_s):
            return
        if self.in_flight or not retry_after_s:
            proven = self._num_accepted if now_s - self._accepted_s < _PROVEN_S else 0
            self.limit = min(self.limit, max(len(self.in_flight), proven, 1))
        self.backoff.rejected(in_flight, now_s, retry_after_s)

    def request_failed(self, in_flight: InFlightRequest, now_s: float) -> None:
        self.errors.append("failed")
        failed_beside = in_flight.sent_s <= self._failed_s and now_s - self._failed_s <= _TOGETHER_S
        in_flight.was_alone = not (self.in_flight or failed_beside)
        self._failed_s = now_s

    @property
    def has_quarantined(self) -> bool:
        """Whether a request in quarantine runs, and has not shown yet that it gets as far as its next token."""
        return any(one.request.is_quarantined and not one.has_first_token for one in self.in_flight)

    def request_completed(self, in_flight: InFlightRequest, now_s: float) -> None:
        """A request has ended. If the backend does not report its queue length, each one raises `limit` by one."""
        if in_flight.began_s is None:
            self._accepted(in_flight, len(self.in_flight) + 1, now_s)
        if self.limit < self.max_in_flight and self.load.waiting is None:
            self.limit += 1

    def _accepted(self, in_flight: InFlightRequest, num_in_flight: int, now_s: float) -> None:
        self.backoff.accepted(in_flight, now_s)
        if num_in_flight >= self._num_accepted or now_s - self._accepted_s >= _PROVEN_S:
            self._num_accepted, self._accepted_s = num_in_flight, now_s

    # Progress of its streams.

    def progressed(self, in_flight: InFlightRequest, now_s: float) -> None:
        gap_s = now_s - in_flight.bytes_s
        in_flight.bytes_s = self.bytes_s = now_s
        if in_flight.began_s is None:
            in_flight.began_s = now_s
            self._accepted(in_flight, len(self.in_flight), now_s)
        elif in_flight.request.stream:
            self.gap_s += (gap_s - self.gap_s) * (_GAP_WEIGHT if self.gap_s else 1.0)

    def received(self, now_s: float) -> None:
        """Bytes arrived on the socket of a request, including comments and data that was not processed yet."""
        self.bytes_s = now_s

    def paused(self, in_flight: InFlightRequest) -> None:
        """Reading is paused because the client is slow, so silence is no sign of a fault in the backend."""
        in_flight.read_since_s = None

    def resumed(self, in_flight: InFlightRequest, now_s: float) -> None:
        in_flight.read_since_s = in_flight.bytes_s = now_s

    def silence_s(self, now_s: float, *, of_streams: bool = False) -> float:
        """Seconds since the last byte; 0 if no request is being read. of_streams: only streams that have begun."""
        read_since_s = min(
            (
                one.read_since_s
                for one in self.in_flight
                if one.read_since_s is not None
                and not one.is_lost
                and (not of_streams or (one.request.stream and one.began_s is not None))
            ),
            default=now_s,
        )
        return now_s - max(self.bytes_s, read_since_s)

    def is_silent(self, now_s: float) -> bool:
        """Whether its streams have been silent for longer than usual and than the prefill of its new prompts can take.

        Many engines stall all streams during a prefill.
        """
        options = self.options
        patience_s = max(options.hang_timeout_s, options.hang_gap_multiplier * self.gap_s)
        if now_s - self.bytes_s <= patience_s or (silence_s := self.silence_s(now_s, of_streams=True)) <= patience_s:
            return False
        prompt_tokens = sum(one.prompt_tokens for one in self.in_flight if one.began_s is None and not one.is_lost)
        return silence_s > patience_s + prompt_tokens / options.min_prefill_rate

    # Load reports from its metrics.

    def reported(self, load: ReplicaLoad) -> None:
        """Lower `limit` while too many requests wait in the backend's own queue, and raise it when none does."""
        self.load = load
        if load.waiting is None or load.running is None:
            return
        spare = self.options.max_waiting_per_replica - load.waiting
        self._num_crowded = self._num_crowded + 1 if spare < 0 else 0
        if self._num_crowded >= 2 or (self._num_crowded and (load.kv_usage or 0.0) >= _FULL):
            self.limit = min(self.limit, max(load.running + self.options.max_waiting_per_replica, 1))
        elif spare >= 0 and self.limit < self.max_in_flight:
            growth = self.limit // 8 if load.waiting == 0 else 0
            self.limit = min(max(self.limit, len(self.in_flight) + spare) + growth, self.max_in_flight)
