"""One replica as its dispatcher sees it: requests in flight, health, and how many more requests it can take.

starting ── probe ok ──► ready ── `unhealthy_threshold` failed probes ──► ejected ── `healthy_threshold` ok ──► ready
                           └── failures of requests, or a hang ──► open (see breaker) ──► ready
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from powerband.dispatch.breaker import CircuitBreaker
from powerband.dispatch.options import DispatchOptions
from powerband.dispatch.request import DispatchRequest, PriorityLevel

# ready: gets requests. starting: not yet found ready. ejected: probes found it unhealthy. open: its circuit breaker is.
# draining: keeps what it has, gets nothing new.
BackendState = Literal["ready", "starting", "ejected", "open", "draining"]
BACKEND_STATES: tuple[BackendState, ...] = get_args(BackendState)

_GAP_WEIGHT = 0.02
_REFUSAL_PAUSE_S = 0.5  # without new requests, after it turned one away and named no time
_MIN_PAUSE_S = 1.0  # at most, after the first refusal that names a time; twice as long after each that follows
_MAX_PAUSE_S = 60.0
_TRIAL_S = 1.0  # a request that was not turned away in this time was taken
_ALONE_S = 60.0  # for which a tenant's refusals say nothing of the backend, once another's request was taken
_FULL = 0.95  # of the KV cache
_LOG_INTERVAL_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSpec:
    """A replica that requests may go to. id: unique, never used again for another process."""

    id: str
    max_num_seqs: int = 256  # requests it computes at once
    weight: float = 1.0  # its share beside others, where routing is weighted
    max_prompt_tokens: int | None = None  # of the requests that it takes; None: any
    draining: bool = False  # gets nothing new, keeps what it has


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """What a replica's metrics report. None: it does not report this."""

    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None  # share of the KV cache, 0 to 1
    tokens: float | None = None  # computed since its start


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
        "is_suspected",
        "is_trial",
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
        """settle: called at its end with the tokens that its tenant has to pay for."""
        self.backend, self.request, self.level, self.sent_s, self.settle = backend, request, level, now_s, settle
        self.queue_s = 0.0
        self.prompt_tokens = request.prompt_tokens
        self.tokens = request.prompt_tokens + request.output_tokens  # at most
        self.outstanding = self.tokens  # that it still counts for
        self.is_trial = backend.breaker.sent()
        self.began_s: float | None = None  # when its first byte came
        self.bytes_s = now_s  # when its last byte came
        self.read_since_s: float | None = now_s  # None: its socket is not read, since its client is slow
        self.has_first_token = False
        self.is_released = False
        self.is_suspected = False  # released so: the request itself may be at fault
        self.is_lost = False  # the backend was found dead or hung: nothing more will come
        self.on_lost: Callable[[], None] | None = None

    def lose(self) -> None:
        self.is_lost = True
        callback, self.on_lost = self.on_lost, None
        if callback is not None:
            callback()


class Backend:
    """`limit`: requests that it may have at once. `outstanding`: tokens that those in flight still take, at most."""

    def __init__(self, spec: BackendSpec, options: DispatchOptions, now_s: float) -> None:
        self.spec = spec
        self.options = options
        self.breaker = CircuitBreaker(options)
        self.in_flight: set[InFlightRequest] = set()
        self.outstanding = 0
        self.sent_tokens = 0.0  # since the start, for shares by weight
        self.turn = 0  # when it was chosen last
        self.is_ready = False
        self.is_removed = False
        self.was_ready = False
        self.since_s = now_s  # when it became what it is
        self.paused_until_s = 0.0  # gets nothing until then: it turned a request away
        self.refusals = 0  # in a row that named a time; then one request at a time is a trial
        self._refused_tenant = ""
        self._alone_until_s: dict[str, float] = {}  # tenants that are refused while others are answered
        self.logged_s = -_LOG_INTERVAL_S
        self.limit = self.max_in_flight
        self.load = ReplicaLoad()
        self.gap_s = 0.0  # between bytes of one stream, usually
        self.bytes_s = now_s
        self.answered_s: float | None = None  # when it last completed a request
        self.restarts: int | None = None
        self.errors: deque[str] = deque(maxlen=5)
        self.ejections = 0  # by its probes
        self.ejected_until_s = 0.0
        self._restarted_s = -math.inf
        self._num_bad, self._num_good = 0, 0  # probes in a row
        self._num_series = 0  # ejections without a long healthy time between them
        self._num_crowded = 0  # reports in a row with too many requests waiting

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
        """Whether requests go to it, now or when a place becomes free."""
        return self.is_ready and not self.spec.draining and not self.is_removed

    def has_place(self, now_s: float) -> bool:
        return (
            len(self.in_flight) < self.limit
            and now_s >= self.paused_until_s
            and not (self.refusals and self._is_trial_running(now_s))
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
        """Whether another line about its responses is due: the same fault comes with each request."""
        if now_s - self.logged_s < _LOG_INTERVAL_S:
            return False
        self.logged_s = now_s
        return True

    # What probes report.

    def probed_well(self, now_s: float, *, is_needed: bool = False) -> bool:
        """Return whether that makes it ready. is_needed: no other is ready, so that an unstable one is better."""
        self._num_bad = 0
        self._num_good += 1
        is_early = now_s < self.ejected_until_s and not is_needed
        if self.is_ready or (self.was_ready and (self._num_good < self.options.healthy_threshold or is_early)):
            return False
        self.is_ready = self.was_ready = True
        self.since_s = now_s
        return True

    @property
    def is_in_doubt(self) -> bool:
        """It is ready, but its last probe failed."""
        return self.is_ready and self._num_bad > 0

    def probed_badly(self, now_s: float, code: str) -> bool:
        """Return whether that ejects it."""
        self._num_good = 0
        self._num_bad += 1
        if not self.errors or self.errors[-1] != code:
            self.errors.append(code)
        return self.is_ready and self._num_bad >= self.options.unhealthy_threshold and self._eject(now_s)

    def found_absent(self, now_s: float, code: str) -> bool:
        """A request found that nothing listens there, or that its engine is gone: as good as `unhealthy_threshold`
        failed probes. Return whether that ejects it."""
        self._num_bad = max(self._num_bad, self.options.unhealthy_threshold - 1)
        return self.probed_badly(now_s, code)

    def _eject(self, now_s: float) -> bool:
        self.is_ready = False
        self.ejections += 1
        self._num_series = 1 if now_s - self.since_s > self.options.max_ejection_s else self._num_series + 1
        if self._num_series > 1:  # the first time it may be back as soon as it is healthy
            out_s = self.options.base_ejection_s * 2.0 ** min(self._num_series - 2, 16)
            self.ejected_until_s = now_s + min(out_s, self.options.max_ejection_s)
        self.since_s = now_s
        return True

    def lose_all(self) -> None:
        """Nothing more will come of any request in flight."""
        for in_flight in tuple(self.in_flight):
            in_flight.lose()

    def restarted(self, now_s: float) -> None:
        """Its engine is another process now. What one that restarts again and again did before is not forgotten."""
        is_rare = now_s - self._restarted_s > self.options.max_ejection_s
        self._restarted_s = now_s
        if is_rare:
            self.replaced()

    def replaced(self) -> None:
        """It is another process now, which did nothing yet."""
        self.limit, self._num_crowded = self.max_in_flight, 0
        self.paused_until_s, self.refusals = 0.0, 0
        self.breaker.reset()

    # What it turns away.

    def sent(self, in_flight: InFlightRequest) -> None:
        if self.refusals and any(self._is_trial(one) for one in self.in_flight):
            self._took(in_flight.request.tenant, in_flight.sent_s)  # the trial was not turned away
        self.in_flight.add(in_flight)

    def refused(self, in_flight: InFlightRequest, now_s: float, pause_s: float) -> None:
        """It turned a request away. pause_s: for which it wants to get no other; 0: it named no time, and has as much
        as it takes.

        A time may be about this request alone, so that the backend is asked again soon, with one request, whatever time
        it named.
        """
        tenant = in_flight.request.tenant
        if now_s < self._alone_until_s.get(tenant, 0.0):
            return
        if self.in_flight or not pause_s:
            self.limit = max(min(self.limit, len(self.in_flight)), 1)
        if not pause_s:
            self.paused_until_s = max(self.paused_until_s, now_s + _REFUSAL_PAUSE_S)
            return
        if not self.refusals or self._is_trial(in_flight):  # what was sent before the pause is a part of the same
            self.refusals, self._refused_tenant = self.refusals + 1, tenant
        max_s = min(_MIN_PAUSE_S * 2.0 ** min(self.refusals - 1, 16), _MAX_PAUSE_S)
        self.paused_until_s = max(self.paused_until_s, now_s + min(max(pause_s, _REFUSAL_PAUSE_S), max_s))

    def _is_trial(self, in_flight: InFlightRequest) -> bool:
        return in_flight.sent_s >= self.paused_until_s

    def _is_trial_running(self, now_s: float) -> bool:
        return any(self._is_trial(one) and now_s - one.sent_s < _TRIAL_S for one in self.in_flight)

    def _took(self, tenant: str, now_s: float) -> None:
        """It takes requests again."""
        if tenant != self._refused_tenant:
            self._alone_until_s = {one: end_s for one, end_s in self._alone_until_s.items() if end_s > now_s}
            self._alone_until_s[self._refused_tenant] = now_s + _ALONE_S
        self.refusals = 0

    def answered(self, in_flight: InFlightRequest, now_s: float) -> None:
        """Where it does not report how many wait there, each answer is a sign that one more may come."""
        if self.refusals and self._is_trial(in_flight):
            self._took(in_flight.request.tenant, now_s)
        if self.limit < self.max_in_flight and self.load.waiting is None:
            self.limit += 1

    # What its streams show.

    def progressed(self, in_flight: InFlightRequest, now_s: float) -> None:
        gap_s = now_s - in_flight.bytes_s
        in_flight.bytes_s = self.bytes_s = now_s
        if in_flight.began_s is None:
            in_flight.began_s = now_s
            if self.refusals and self._is_trial(in_flight):
                self._took(in_flight.request.tenant, now_s)
        elif in_flight.request.stream:
            self.gap_s += (gap_s - self.gap_s) * (_GAP_WEIGHT if self.gap_s else 1.0)

    def received(self, now_s: float) -> None:
        """Bytes of any kind came on the socket of a request: also comments, and what is not read yet."""
        self.bytes_s = now_s

    def paused(self, in_flight: InFlightRequest) -> None:
        """Its socket is not read, since its client is slow: that nothing comes says nothing of the backend."""
        in_flight.read_since_s = None

    def resumed(self, in_flight: InFlightRequest, now_s: float) -> None:
        in_flight.read_since_s = in_flight.bytes_s = now_s

    def silence_s(self, now_s: float, *, of_streams: bool = False) -> float:
        """Since the last byte, while requests are read and not given up; else 0. of_streams: that have begun."""
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
        """Whether nothing has come for longer than usual, and than it may take to compute the prompts that are there:
        many engines let all streams wait for a new prompt.
        """
        options = self.options
        patience_s = max(options.hang_timeout_s, options.hang_gap_multiplier * self.gap_s)
        if now_s - self.bytes_s <= patience_s or (silence_s := self.silence_s(now_s, of_streams=True)) <= patience_s:
            return False
        prompt_tokens = sum(one.prompt_tokens for one in self.in_flight if one.began_s is None and not one.is_lost)
        return silence_s > patience_s + prompt_tokens / options.min_prefill_rate

    # What its metrics report.

    def reported(self, load: ReplicaLoad) -> None:
        """Take fewer requests when more wait there than should, and again more when none does."""
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
