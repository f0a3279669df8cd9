"""Decides which backend a request goes to, and when. Requests queue here, and nowhere else, until a backend has a
free slot.

    submit ─► admitted? ─► a slot is free ─────────────► InFlightRequest ── release ─► the slot goes to the next
                 │ no       └ none: queue (fair, bounded) ──┘
                 └─► PoolFull, DeadlineUnreachable, …         … or QueueTimeout

A backend has max_num_seqs slots and a few more, so that it never idles. A queued request can go to any backend,
including one that is added later.

The dispatcher has no clock, does no I/O and uses no randomness. Its caller passes the time of every event, in
nondecreasing order, collects the outcomes of queued requests with `take_decided`, and calls `tick` at `next_deadline`.
The gateway does so with sockets and timers, the planner's simulator in virtual time.

    dispatcher = Dispatcher()
    dispatcher.update([BackendSpec(id="a")], now_s=0.0)
    placed = dispatcher.submit(DispatchRequest(prompt_tokens=10, output_tokens=20), now_s=0.0)
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from itertools import count, islice
from typing import Literal

from powerband.dispatch.backend import Backend, BackendSpec, InFlightRequest, ReplicaLoad
from powerband.dispatch.breaker import RetryBudgets
from powerband.dispatch.errors import NoReplicaAvailable, PoolError, ReplicasBusy
from powerband.dispatch.length_pools import LengthPool, arrange, pool_for
from powerband.dispatch.options import DispatchOptions
from powerband.dispatch.queue import QueuedRequest
from powerband.dispatch.request import DispatchRequest, PriorityLevel
from powerband.dispatch.routing import make_router, open_to, without

NO_REPLICA_RETRY_S = 5.0
TICK_S = 0.05  # between two checks of queued requests and of backends that are not serving
_HEALTHY_S = 60.0  # a backend counts as healthy for so long after it has completed a request
_MAX_PAUSE_S = 5.0  # requests wait for replicas that sent a Retry-After up to this; beyond it they are rejected
_REPLACEMENT_S = 15.0  # without any replica, requests wait so long for a new one

# How a request ended. ok: succeeded. failed: the backend was at fault. unconfirmed: the backend reported an error, but
# the request itself may be at fault; `confirm_failure` may follow. rejected: the backend is at capacity (429, 503).
# unavailable: no server listens there, or its engine is gone. cancelled: the client disconnected, or the failure says
# nothing about the backend. unsent: it was never sent to the backend.
Outcome = Literal["ok", "failed", "unconfirmed", "rejected", "unavailable", "cancelled", "unsent"]


class Dispatcher:
    """The queue in front of one model's replicas, and the state of each replica."""

    def __init__(self, options: DispatchOptions | None = None) -> None:
        self.options = options or DispatchOptions()
        self._backends: dict[str, Backend] = {}
        self._leaving: list[Backend] = []  # removed, but with requests in flight
        self._pools = arrange((), (), self.options)
        self._router = make_router(self.options)
        self._retries = RetryBudgets(self.options)
        self._num_in_flight: Counter[str] = Counter()  # by tenant
        self._had_backend_s = -_REPLACEMENT_S
        self._decided: list[QueuedRequest] = []
        self._expiries: list[tuple[float, int, QueuedRequest]] = []  # a heap; some have left the queue
        self._order = count()
        self._tick_due_s: float | None = None

    # Requests.

    def submit(
        self, request: DispatchRequest, now_s: float, *, avoid: Collection[str] = ()
    ) -> InFlightRequest | QueuedRequest:
        """Send a request to a backend, or queue it. avoid: backends that failed with it, used only if no other serves.

        Raises PoolFull, DeadlineUnreachable, NoReplicaAvailable and ReplicasBusy.
        """
        pool = pool_for(request, self._pools)
        # A retry goes ahead of new requests.
        rank = -1 if request.is_quarantined else 0 if avoid else 1
        level = pool.queue.level_for(request.tenant, (rank, request.priority))
        sent = None if pool.queue.requests else self._send_at_once(request, avoid, pool, level, now_s)
        return sent or self._enqueue(request, pool, level, frozenset(avoid), now_s)

    def take_decided(self) -> Sequence[QueuedRequest]:
        """Queued requests that were sent or rejected since the last call, oldest first: see their `outcome`."""
        if not self._decided:
            return ()
        decided, self._decided = self._decided, []
        return decided

    def cancel(self, queued: QueuedRequest, now_s: float) -> None:
        """The client disconnected while its request was queued."""
        self._remove(queued, now_s)

    def first_token(self, in_flight: InFlightRequest, now_s: float, prompt_tokens: int | None = None) -> None:
        """The prefill is done. prompt_tokens: the backend's count. Only the first call has an effect."""
        in_flight.backend.progressed(in_flight, now_s)
        if in_flight.has_first_token or in_flight.is_released:
            return
        in_flight.has_first_token = True
        request = in_flight.request
        in_flight.prompt_tokens = request.prompt_tokens if prompt_tokens is None else prompt_tokens
        in_flight.outstanding -= request.prompt_tokens
        in_flight.backend.outstanding -= request.prompt_tokens
        pool_for(request, self._pools).admission.record_service(request.tenant, now_s - in_flight.sent_s)

    def release(
        self,
        in_flight: InFlightRequest,
        outcome: Outcome,
        now_s: float,
        *,
        output_tokens: int = 0,
        retry_after_s: float = 0.0,
    ) -> None:
        """A request ended: its slot goes to the next one. Only the first call has an effect.

        output_tokens: tokens generated. retry_after_s: the Retry-After of a backend that rejected it.
        """
        if in_flight.is_released:
            return
        in_flight.is_released, in_flight.on_lost = True, None
        in_flight.is_unconfirmed = outcome == "unconfirmed"
        backend, request = in_flight.backend, in_flight.request
        pool = pool_for(request, self._pools)
        self._num_in_flight[request.tenant] -= 1
        if not self._num_in_flight[request.tenant]:
            del self._num_in_flight[request.tenant]
        backend.in_flight.discard(in_flight)
        backend.outstanding -= in_flight.outstanding
        is_done = outcome in ("ok", "cancelled")
        if is_done:
            self._observe(pool, request.tenant, now_s)
            pool.admission.record_end(request.tenant, in_flight.tokens, now_s - in_flight.sent_s)
            backend.request_completed(in_flight, now_s)
            if outcome == "ok":
                backend.last_success_s = now_s
        elif outcome == "rejected":
            backend.rejected(in_flight, now_s, retry_after_s)
        elif outcome == "unavailable":
            if backend.mark_unavailable(now_s, "absent"):
                self.changed(backend, now_s)
        elif outcome == "failed":
            backend.request_failed(in_flight, now_s)
        # Failed requests are not charged to the tenant's fair share.
        paid = in_flight.prompt_tokens + output_tokens if is_done else 0
        in_flight.settle(paid)
        # If the backend was found dead, its probes have counted the failure already.
        is_ok = True if outcome == "ok" else False if outcome == "failed" else None
        self._count(in_flight, None if in_flight.is_lost else is_ok, now_s)
        if self.queued:
            self._dispatch(now_s)

    def confirm_failure(self, in_flight: InFlightRequest, now_s: float) -> None:
        """A request that was released as "unconfirmed" has succeeded elsewhere: this backend was at fault."""
        in_flight.backend.errors.append("failed")
        self._count(in_flight, False, now_s)

    def may_retry(self, in_flight: InFlightRequest, now_s: float) -> bool:
        """Whether a failed request may be retried; takes the retry from its tenant's budget.

        Unconfirmed failures have a budget of their own. If the backend is known to be down, the retry is free: it
        happens once for each of that backend's requests, so it cannot become a storm.
        """
        backend = in_flight.backend
        if not backend.is_serving or not backend.breaker.is_closed:
            self._retries.taken += 1
            return True
        tenant = in_flight.request.tenant
        return self._retries.take(now_s, self._num_in_flight[tenant], (tenant, in_flight.is_unconfirmed))

    # Backends.

    def update(
        self,
        specs: Iterable[BackendSpec],
        now_s: float,
        *,
        planned_rate: float | None = None,
        slo_ttft_s: float | None = None,
    ) -> None:
        """Replace the set of backends. Backends that stay keep their state; queued requests may go to any.

        planned_rate: requests per second that the plan expects of all together. slo_ttft_s: the SLO's TTFT. None:
        unknown.
        """
        if any(not backend.spec.draining for backend in self._backends.values()):
            self._had_backend_s = now_s
        backends: dict[str, Backend] = {}
        for spec in specs:
            backend = self._backends.pop(spec.id, None) or Backend(spec, self.options, now_s)
            has_grown = backend.spec.max_num_seqs != spec.max_num_seqs
            backend.spec = spec
            if has_grown:
                backend.limit = backend.max_in_flight
            backends[spec.id] = backend
        for backend in self._backends.values():
            backend.is_removed = True
            self._router.forget(backend.id)
        self._leaving = [one for one in (*self._leaving, *self._backends.values()) if one.in_flight]
        self._backends = backends
        self._rearrange(now_s)
        for pool in self._pools:
            pool.admission.capacity.planned = planned_rate / len(backends) if planned_rate and backends else None
            pool.admission.slo_ttft_s = slo_ttft_s

    @property
    def backends(self) -> list[Backend]:
        """All backends, including removed ones with requests in flight."""
        return [*self._backends.values(), *(backend for backend in self._leaving if backend.in_flight)]

    @property
    def current(self) -> Iterable[Backend]:
        """All backends except removed ones."""
        return self._backends.values()

    def changed(self, backend: Backend, now_s: float) -> None:
        """A probe has made the backend ready, or ejected it."""
        self._rearrange(now_s)
        if not backend.is_ready:
            self._router.forget(backend.id)

    def restarted(self, backend: Backend, now_s: float) -> None:
        """The backend's engine has restarted."""
        backend.restarted(now_s)
        self._router.forget(backend.id)

    def replaced(self, backend: Backend) -> None:
        """A new process at another address has taken the backend's place."""
        backend.replaced()
        self._router.forget(backend.id)

    def hung(self, backend: Backend, now_s: float) -> None:
        """The backend passes its probes, but its streams are stuck."""
        backend.errors.append("hung")
        if backend.is_ready and self._may_open():
            backend.breaker.force_open(now_s)
            self._schedule_tick(now_s)
        backend.fail_in_flight()

    def reported(self, backend: Backend, load: ReplicaLoad, now_s: float) -> None:
        """Apply a load report from the backend's metrics."""
        before = backend.load.tokens
        if load.tokens is not None and before is not None and load.tokens < before:  # the counters were reset
            self.restarted(backend, now_s)
        backend.reported(load)
        self._dispatch(now_s)

    def are_healthy(self, ids: Iterable[str], now_s: float) -> bool:
        """Whether each of these backends completed a request in the last minute."""
        since_s = now_s - _HEALTHY_S
        backends = [self._backends.get(id) for id in ids]
        return all(one is not None and one.last_success_s >= since_s for one in backends)

    def has_others(self, than: Collection[str]) -> bool:
        """Whether any other backend is serving."""
        return any(backend.is_serving and backend.id not in than for backend in self._backends.values())

    def serves_longer(self, max_prompt_tokens: int) -> bool:
        """Whether a backend that accepts prompts longer than this is serving."""
        return any(pool.max_prompt_tokens > max_prompt_tokens and pool.serving for pool in self._pools)

    def may_log(self, id: str, now_s: float) -> bool:
        """Whether another log line about this backend's responses is due."""
        backend = self._backends.get(id)
        return backend is not None and backend.may_log(now_s)

    @property
    def is_ready(self) -> bool:
        """Whether any backend is serving."""
        return any(backend.is_serving for backend in self._backends.values())

    # The queue.

    @property
    def queued(self) -> int:
        return sum(pool.queue.requests for pool in self._pools)

    @property
    def queued_tokens(self) -> int:
        return sum(pool.queue.tokens for pool in self._pools)

    @property
    def num_retries(self) -> int:
        """Since the start."""
        return self._retries.taken

    @property
    def predicted_wait_s(self) -> float:
        """Seconds until all queued requests are dispatched, in the slowest length pool; 0: unknown."""
        waits = (pool.admission.capacity.wait_s(pool.queue.tokens, pool.queue.requests) for pool in self._pools)
        return max(wait_s or 0.0 for wait_s in waits)

    def next_deadline(self) -> float | None:
        """When to call `tick` if nothing else happens first; None: no call is needed."""
        expiries = self._expiries
        while expiries and not expiries[0][2].is_queued:
            heapq.heappop(expiries)
        if not expiries:
            return self._tick_due_s
        expires_s = expiries[0][0]
        return expires_s if self._tick_due_s is None else min(expires_s, self._tick_due_s)

    def tick(self, now_s: float) -> None:
        """Handle what is due: queue timeouts, overload checks, and backends whose pause has ended."""
        while self._expiries and self._expiries[0][0] <= now_s:
            self._expire(heapq.heappop(self._expiries)[2], now_s)
        if self._tick_due_s is None or now_s < self._tick_due_s:
            return
        self._tick_due_s = None
        is_complete = self._is_complete
        for pool in self._pools:
            pool.admission.watch(pool.queue, now_s, is_complete=is_complete)
            if pool.admission.is_overloaded:  # requests queued before the overload are checked now
                for queued in tuple(pool.queue):
                    if not queued.avoid and pool.admission.is_late(queued.request, now_s):
                        self._expire(queued, now_s)
        if self.queued:
            if self._expects_no_replica(now_s):
                self.reject_all("No replica is ready, and none is expected.", now_s)
            self._reject_paused(now_s)
            self._dispatch(now_s)
        self._schedule_tick(now_s)

    def reject_all(self, why: str, now_s: float) -> None:
        """Reject every queued request with NoReplicaAvailable."""
        for queued in [queued for pool in self._pools for queued in pool.queue]:
            self._remove(queued, now_s)
            self._decide(queued, NoReplicaAvailable(why, retry_after_s=NO_REPLICA_RETRY_S))

    def _reject_paused(self, now_s: float) -> None:
        """Reject queued requests whose backends are all paused for longer than `_MAX_PAUSE_S`."""
        for pool in self._pools:
            if any(backend.backoff.paused_until_s - now_s <= _MAX_PAUSE_S for backend in pool.serving):
                continue
            for queued in tuple(pool.queue):
                try:
                    _check_pauses(pool, queued.avoid, now_s)
                except ReplicasBusy as problem:
                    self._remove(queued, now_s)
                    self._decide(queued, problem)

    # Dispatch.

    def _rearrange(self, now_s: float) -> None:
        self._pools = arrange(self._pools, self._backends.values(), self.options)
        self._dispatch(now_s)
        self._schedule_tick(now_s)

    def _dispatch(self, now_s: float) -> None:
        for pool in self._pools:
            free = [one for one in pool.serving if one.has_capacity(now_s)] if pool.queue.requests else []
            while free and pool.queue.requests:
                queued = pool.queue.pop(partial(self._pick, free, pool.serving, now_s))
                if queued is None:
                    break
                among = open_to(queued.request, queued.avoid, free, pool.serving, now_s)
                backend = self._router.choose(queued.request, among, pool.serving)
                sent = self._send(queued.request, backend, pool, queued.level, now_s)
                sent.queue_s = now_s - queued.queued_s
                self._observe(pool, queued.request.tenant, now_s)
                self._decide(queued, sent)
                free = [one for one in free if one.has_capacity(now_s)]
            pool.observe(now_s)

    def _pick(
        self, free: list[Backend], serving: list[Backend], now_s: float, requests: Iterable[QueuedRequest]
    ) -> QueuedRequest | None:
        """One tenant's next request: its first, or one of the next few that has a higher affinity to the only free
        backend.
        """
        first = next(iter(requests))
        if not open_to(first.request, first.avoid, free, serving, now_s):
            return None
        lookahead = self.options.affinity_lookahead
        if len(free) > 1 or len(serving) == 1 or first.num_passed >= lookahead:
            return first
        best, gain = first, self._router.affinity(first.request, free[0])
        for queued in islice(requests, 1, lookahead):
            if gain < 1 and not queued.avoid and (better := self._router.affinity(queued.request, free[0])) > gain:
                best, gain = queued, better
        if best is not first:
            first.num_passed += 1
        return best

    def _observe(self, pool: LengthPool, tenant: str, now_s: float) -> None:
        """Update the capacity measurements after a tenant's queued or running requests have changed."""
        pool.observe(now_s)
        pool.observe_tenant(tenant, self._num_in_flight[tenant], now_s)

    def _send(
        self, request: DispatchRequest, backend: Backend, pool: LengthPool, level: PriorityLevel, now_s: float
    ) -> InFlightRequest:
        tokens = request.prompt_tokens + request.output_tokens
        sent = InFlightRequest(
            backend, request, level, now_s, settle=partial(pool.queue.settle, level, request.tenant, tokens)
        )
        backend.sent(sent)
        backend.outstanding += sent.tokens
        self._num_in_flight[request.tenant] += 1
        self._router.dispatched(request, backend)
        pool.admission.capacity.dispatched()
        return sent

    def _send_at_once(
        self, request: DispatchRequest, avoid: Collection[str], pool: LengthPool, level: PriorityLevel, now_s: float
    ) -> InFlightRequest | None:
        free = [backend for backend in pool.serving if backend.has_capacity(now_s)]
        free = open_to(request, avoid, free, pool.serving, now_s)
        if not free:
            return None
        if not avoid:
            pool.admission.check_late(request, now_s)
        backend = self._router.choose(request, free, pool.serving)
        pool.queue.charge(level, request.tenant, request.prompt_tokens + request.output_tokens)
        return self._send(request, backend, pool, level, now_s)

    def _count(self, in_flight: InFlightRequest, is_ok: bool | None, now_s: float) -> None:
        """Report to the backend's circuit breaker how a request ended."""
        may_open = is_ok is False and self._may_open()
        in_flight.backend.breaker.ended(now_s, is_ok, is_trial=in_flight.is_trial, may_open=may_open)
        if is_ok is False:
            self._schedule_tick(now_s)

    def _may_open(self) -> bool:
        """Whether one more breaker may open: at most half of the serving backends may be ejected by their breakers."""
        serving = [backend for backend in self._backends.values() if backend.is_serving]
        num_open = sum(not backend.breaker.is_closed for backend in serving)
        return num_open + 1 <= len(serving) // 2

    # Queued requests and their outcomes.

    def _enqueue(
        self, request: DispatchRequest, pool: LengthPool, level: PriorityLevel, avoid: frozenset[str], now_s: float
    ) -> QueuedRequest:
        """Queue a request. Raises PoolError if it is rejected; a retry skips admission control."""
        if self._expects_no_replica(now_s):
            why = "No replica is ready, and none is expected."
            raise NoReplicaAvailable(why, retry_after_s=NO_REPLICA_RETRY_S)
        _check_pauses(pool, avoid, now_s)
        if avoid:
            expires_s = now_s + self.options.max_queue_wait_s
            if request.deadline_s is not None:
                expires_s = min(expires_s, max(request.deadline_s, now_s))
        else:
            waiting = (self.queued, self.queued_tokens)
            expires_s = pool.admission.admit(request, level, pool.queue, now_s, waiting)
        queued = QueuedRequest(request, request.prompt_tokens + request.output_tokens, level, now_s, avoid)
        pool.queue.push(queued)
        self._observe(pool, request.tenant, now_s)
        heapq.heappush(self._expiries, (expires_s, next(self._order), queued))
        if len(self._expiries) > 64 + 2 * self.queued:
            self._expiries = [entry for entry in self._expiries if entry[2].is_queued]
            heapq.heapify(self._expiries)
        self._dispatch(now_s)
        self._schedule_tick(now_s)
        return queued

    def _expects_no_replica(self, now_s: float) -> bool:
        """Whether no backend is ready, and none is likely to become ready soon."""
        staying = [backend for backend in self._backends.values() if not backend.spec.draining]
        if any(one.is_ready or now_s - one.since_s < self.options.max_queue_wait_s for one in staying):
            return False
        return bool(staying) or now_s - self._had_backend_s > _REPLACEMENT_S

    def _expire(self, queued: QueuedRequest, now_s: float) -> None:
        if queued.is_queued:
            pool = self._remove(queued, now_s)
            self._decide(queued, pool.admission.timeout(now_s - queued.queued_s))

    def _remove(self, queued: QueuedRequest, now_s: float) -> LengthPool:
        pool = pool_for(queued.request, self._pools)
        pool.queue.remove(queued)
        self._observe(pool, queued.request.tenant, now_s)
        return pool

    def _decide(self, queued: QueuedRequest, outcome: InFlightRequest | PoolError) -> None:
        queued.outcome = outcome
        self._decided.append(queued)

    @property
    def _is_complete(self) -> bool:
        return all(backend.is_serving and backend.breaker.is_closed for backend in self._backends.values())

    def _schedule_tick(self, now_s: float) -> None:
        """Schedule a tick if requests are queued, an overload is being tracked, or a backend is not serving."""
        if self._tick_due_s is None and (
            self.queued or not self._is_complete or not all(pool.admission.is_settled for pool in self._pools)
        ):
            self._tick_due_s = now_s + TICK_S


def _check_pauses(pool: LengthPool, avoid: Collection[str], now_s: float) -> None:
    """Raise ReplicasBusy if every backend is paused for longer than `_MAX_PAUSE_S`."""
    pauses_s = [backend.backoff.paused_until_s - now_s for backend in without(avoid, pool.serving, pool.serving)]
    if pauses_s and (pause_s := min(pauses_s)) > _MAX_PAUSE_S:
        raise ReplicasBusy(
            f"Every replica has asked for a pause (Retry-After); the shortest ends in {pause_s:.0f} s.",
            retry_after_s=pause_s,
        )
