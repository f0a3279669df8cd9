"""One replica as its pool knows it: what was sent there and not heard the end of, whether it is well, what it can take.

starting ── probe ok ──► ready ── `fall` bad probes, or hung ──► ejected ── `rise` good probes ──► ready
                           └── its own failures ──► open (see breaker) ──► ready
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from powerband.gateway.dispatch.breaker import Breaker
from powerband.gateway.engine_names import Load
from powerband.gateway.pool_options import PoolOptions
from powerband.gateway.routes import ReplicaAddress
from powerband.gateway.snapshot import ReplicaSnapshot, ReplicaState

_GAP_WEIGHT = 0.02
_BUSY_S = 0.5  # that it gets nothing after it turned a request away
_FULL = 0.95  # of the KV cache
_LOG_EVERY_S = 60.0


class Stay:
    """A request's time with a replica. began_s: when its first byte came; None: not yet."""

    __slots__ = ("began_s", "bytes_s", "is_stream", "lost", "on_lost", "tokens")

    def __init__(self, is_stream: bool, now_s: float, tokens: int) -> None:
        self.began_s: float | None = None
        self.bytes_s = now_s
        self.is_stream = is_stream
        self.tokens = tokens  # that it still counts for
        self.lost = False
        self.on_lost: Callable[[], None] | None = None

    def lose(self) -> None:
        self.lost = True
        callback, self.on_lost = self.on_lost, None
        if callback is not None:
            callback()


class Member:
    """`limit`: requests that it may have at once. `outstanding`: tokens that they have before them, at most."""

    def __init__(self, address: ReplicaAddress, options: PoolOptions, now_s: float) -> None:
        self.address = address
        self.options = options
        self.breaker = Breaker(options)
        self.stays: set[Stay] = set()
        self.outstanding = 0
        self.sent_tokens = 0.0  # of all time, for shares by weight
        self.turn = 0  # when it was chosen last
        self.is_ready = False
        self.is_removed = False
        self.was_ready = False
        self.since_s = now_s  # when it became what it is
        self.busy_until_s = 0.0  # gets nothing until then: it turned a request away
        self.logged_s = -_LOG_EVERY_S
        self.limit = self.most
        self.load = Load()
        self.gap_s = 0.0  # between bytes of one stream, usually
        self.bytes_s = now_s
        self.answered_s: float | None = None  # when it last ended an answer well
        self.restarts: int | None = None
        self.errors: deque[str] = deque(maxlen=5)
        self.ejections = 0  # by its probes
        self._bad, self._good = 0, 0
        self._falls = 0  # without a good while between them
        self._out_until_s = 0.0
        self._crowded = 0

    @property
    def id(self) -> str:
        return self.address.id

    @property
    def seats(self) -> int:
        """Requests that it computes at once."""
        return self.address.max_num_seqs

    @property
    def most(self) -> int:
        return self.seats + self.options.max_waiting_per_replica

    @property
    def takes_new(self) -> bool:
        """Whether it is among those that requests go to, now or when a place becomes free."""
        return self.is_ready and not self.address.draining and not self.is_removed

    def has_place(self, now_s: float) -> bool:
        return (
            len(self.stays) < self.limit
            and now_s >= self.busy_until_s
            and (self.breaker.is_closed or self.breaker.allows(now_s))
        )

    @property
    def state(self) -> ReplicaState:
        if self.address.draining or self.is_removed:
            return "draining"
        if not self.is_ready:
            return "ejected" if self.was_ready else "starting"
        return "ready" if self.breaker.is_closed else "open"

    def may_log(self, now_s: float) -> bool:
        """Whether it is time for another line about its answers: the same fault comes with each request."""
        if now_s - self.logged_s < _LOG_EVERY_S:
            return False
        self.logged_s = now_s
        return True

    # What probes say.

    def probed_well(self, now_s: float, *, is_needed: bool = False) -> bool:
        """Whether that makes it ready. is_needed: there is no other, so that one which comes and goes is better."""
        self._bad = 0
        self._good += 1
        is_early = now_s < self._out_until_s and not is_needed
        if self.is_ready or (self.was_ready and (self._good < self.options.rise or is_early)):
            return False
        self.is_ready = self.was_ready = True
        self.since_s = now_s
        return True

    @property
    def is_in_doubt(self) -> bool:
        """It is ready, but its last probe was bad."""
        return self.is_ready and self._bad > 0

    def probed_badly(self, now_s: float, code: str) -> bool:
        """Whether that ejects it."""
        self._good = 0
        self._bad += 1
        if not self.errors or self.errors[-1] != code:
            self.errors.append(code)
        return self.is_ready and self._bad >= self.options.fall and self._eject(now_s)

    def found_absent(self, now_s: float, code: str) -> bool:
        """A request found that nothing listens there, or that its engine is gone: as good as `fall` bad probes. Whether
        that ejects it."""
        self._bad = max(self._bad, self.options.fall - 1)
        return self.probed_badly(now_s, code)

    def _eject(self, now_s: float) -> bool:
        self.is_ready = False
        self.ejections += 1
        self._falls = 1 if now_s - self.since_s > self.options.longest_eject_s else self._falls + 1
        if self._falls > 1:  # the first time it may be back as soon as it is well
            out_s = self.options.eject_s * 2.0 ** min(self._falls - 2, 16)
            self._out_until_s = now_s + min(out_s, self.options.longest_eject_s)
        self.since_s = now_s
        return True

    def lose_all(self) -> None:
        """Whoever reads from it need not wait any longer."""
        for stay in tuple(self.stays):
            stay.lose()

    def restarted(self) -> None:
        self.limit, self._crowded, self.busy_until_s = self.most, 0, 0.0
        self.breaker.reset()

    def refused(self, now_s: float) -> None:
        """It turned a request away: it has as much as it takes."""
        self.busy_until_s = max(self.busy_until_s, now_s + _BUSY_S)
        self.limit = max(min(self.limit, len(self.stays)), 1)

    def answered(self) -> None:
        """Where it does not say how many wait there, each answer is a sign that one more may come."""
        if self.limit < self.most and self.load.waiting is None:
            self.limit += 1

    # What its streams say.

    def progressed(self, stay: Stay, now_s: float) -> None:
        gap_s = now_s - stay.bytes_s
        stay.bytes_s = self.bytes_s = now_s
        if stay.began_s is None:
            stay.began_s = now_s
        elif stay.is_stream:
            self.gap_s += (gap_s - self.gap_s) * (_GAP_WEIGHT if self.gap_s else 1.0)

    def silence_s(self, now_s: float) -> float:
        """Since the last byte, if there are streams that have begun and are not given up; else 0."""
        has_begun = any(stay.is_stream and stay.began_s is not None and not stay.lost for stay in self.stays)
        return now_s - self.bytes_s if has_begun else 0.0

    def is_silent(self, now_s: float, at_least_s: float) -> bool:
        return self.silence_s(now_s) > max(at_least_s, self.options.hung_after_gaps * self.gap_s)

    # What its metrics say.

    def reported(self, load: Load) -> None:
        """Take fewer requests when more wait there than should, and again more when none does."""
        self.load = load
        if load.waiting is None or load.running is None:
            return
        spare = self.options.max_waiting_per_replica - load.waiting
        self._crowded = self._crowded + 1 if spare < 0 else 0
        if self._crowded >= 2 or (self._crowded and (load.kv_usage or 0.0) >= _FULL):
            self.limit = min(self.limit, max(load.running + self.options.max_waiting_per_replica, 1))
        elif spare >= 0 and self.limit < self.most:
            growth = self.limit // 8 if load.waiting == 0 else 0
            self.limit = min(max(self.limit, len(self.stays) + spare) + growth, self.most)

    def snapshot(self, now_s: float) -> ReplicaSnapshot:
        load = self.load
        return ReplicaSnapshot(
            id=self.id,
            state=self.state,
            inflight=len(self.stays),
            running=len(self.stays) if load.running is None else load.running,
            waiting=load.waiting or 0,
            kv_usage=load.kv_usage,
            silent_s=now_s - max(stay.bytes_s for stay in self.stays) if self.stays else 0.0,
            ejected_for_s=max(self._out_until_s - now_s, self.breaker.open_until_s - now_s, 0.0),
            ejections=self.ejections + self.breaker.ejections,
            last_errors=tuple(self.errors),
        )
