"""The dispatcher of one served model on an asyncio event loop: its timer, the futures of queued requests, and leases.

Belongs to one event loop. Only `lease` waits.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from powerband.dispatch.backend import Backend, BackendSpec, InFlightRequest, ReplicaLoad
from powerband.dispatch.dispatcher import Dispatcher, Outcome
from powerband.dispatch.errors import PoolError
from powerband.dispatch.queue import QueuedRequest
from powerband.gateway.options import PoolOptions
from powerband.gateway.request import GatewayRequest
from powerband.gateway.routes import ModelRoute, ReplicaAddress
from powerband.gateway.snapshot import PoolSnapshot, ReplicaSnapshot

logger = logging.getLogger(__name__)


class Pool:
    """The replicas of one served model. clock: seconds, monotonic; the event loop's timers must follow it."""

    def __init__(self, options: PoolOptions | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.options = options or PoolOptions()
        self.clock = clock
        self.model = ""
        self.dispatcher = Dispatcher(self.options)
        self._addresses: dict[str, ReplicaAddress] = {}
        self.adapters: dict[str, frozenset[str]] = {}  # by replica: the names of the LoRA adapters that it lists
        self.wanted_adapters: Mapping[str, str] = {}  # name → path, of those that each replica should have
        self._futures: dict[QueuedRequest, asyncio.Future[InFlightRequest]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due_s = 0.0
        self.crashed_s = -math.inf  # when a replica last crashed or hung with a request

    # For the gateway.

    def update(self, route: ModelRoute) -> None:
        """Replace the set of replicas. Replicas that stay keep their state; queued requests may go to any."""
        self.model = route.name
        before, addresses = self._addresses, {address.id: address for address in route.replicas}
        self.dispatcher.update(
            [_spec(address) for address in route.replicas],
            self.clock(),
            planned_rate=route.rate,
            slo_ttft_s=None if route.slo is None else route.slo.ttft_s,
        )
        for backend in self.dispatcher.backends:
            known = before.get(backend.id)
            new = addresses.setdefault(backend.id, known) if known is not None else addresses[backend.id]
            if known is not None and new.url != known.url:
                self.dispatcher.replaced(backend)
        self._addresses = addresses
        self.adapters = {id: names for id, names in self.adapters.items() if id in addresses}
        self._deliver()

    @property
    def addresses(self) -> Sequence[ReplicaAddress]:
        return tuple(self._addresses.values())

    def lists_adapter(self, id: str, name: str, *, listed: bool = True) -> None:
        """Note that a replica has, or no longer has, an adapter, before it is asked the next time."""
        known = self.adapters.get(id, frozenset())
        self.adapters[id] = known | {name} if listed else known - {name}

    async def lease(self, request: GatewayRequest, *, avoid: Collection[str] = ()) -> Lease:
        """Wait for a slot at a replica. avoid: replicas that failed with the request, used only if no other serves.

        Raises PoolFull, DeadlineUnreachable and NoReplicaAvailable at once, QueueTimeout after a wait. Cancelling the
        call removes the request from the queue.
        """
        placed = self.dispatcher.submit(request, self.clock(), avoid=avoid)
        if isinstance(placed, QueuedRequest):
            future = self._futures[placed] = asyncio.get_running_loop().create_future()
            self._deliver()
            try:
                sent = await future
            except asyncio.CancelledError:
                self._abandon(placed, future)
                raise
        else:
            sent = placed
        return Lease(self, sent, request, self._addresses[sent.backend.id])

    def may_retry(self, lease: Lease) -> bool:
        """Whether a failed request may be retried; takes the retry from its tenant's budget."""
        return self.dispatcher.may_retry(lease.in_flight, self.clock())

    def are_healthy(self, ids: Iterable[str]) -> bool:
        """Whether each of these replicas completed a request in the last minute."""
        return self.dispatcher.are_healthy(ids, self.clock())

    def has_others(self, than: Collection[str]) -> bool:
        """Whether any other replica is serving."""
        return self.dispatcher.has_others(than)

    def serves_longer(self, max_prompt_tokens: int) -> bool:
        """Whether a replica that accepts prompts longer than this is serving."""
        return self.dispatcher.serves_longer(max_prompt_tokens)

    def record_crash(self) -> float:
        """A replica crashed or hung with a request: all are probed at once. Returns the time."""
        self.crashed_s = self.clock()
        return self.crashed_s

    def may_log(self, id: str) -> bool:
        """Whether another log line about this replica's responses is due."""
        return self.dispatcher.may_log(id, self.clock())

    def snapshot(self) -> PoolSnapshot:
        now_s, dispatcher = self.clock(), self.dispatcher
        return PoolSnapshot(
            model=self.model,
            queued=dispatcher.queued,
            queued_tokens=dispatcher.queued_tokens,
            predicted_wait_s=dispatcher.predicted_wait_s,
            retries=dispatcher.num_retries,
            replicas=tuple(_replica_snapshot(backend, now_s) for backend in dispatcher.current),
        )

    def close(self) -> None:
        """Reject all queued requests."""
        self.dispatcher.reject_all("The gateway is ending.", self.clock())
        self._deliver()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # For the prober.

    @property
    def backends(self) -> list[Backend]:
        """The backends to probe, including removed ones that finish their requests."""
        return self.dispatcher.backends

    @property
    def is_ready(self) -> bool:
        """Whether any replica is serving."""
        return self.dispatcher.is_ready

    def address(self, backend: Backend) -> ReplicaAddress:
        return self._addresses[backend.id]

    def changed(self, backend: Backend) -> None:
        """A probe has made the backend ready, or ejected it."""
        self.dispatcher.changed(backend, self.clock())
        self._deliver()

    def restarted(self, backend: Backend) -> None:
        """The backend's engine has restarted."""
        self.dispatcher.restarted(backend, self.clock())

    def hung(self, backend: Backend) -> None:
        """The backend passes its probes, but its streams are stuck."""
        self.dispatcher.hung(backend, self.clock())
        self._deliver()

    def reported(self, backend: Backend, load: ReplicaLoad) -> None:
        """Apply a load report from the replica's metrics."""
        self.dispatcher.reported(backend, load, self.clock())
        self._deliver()

    # For leases.

    def release(
        self, sent: InFlightRequest, outcome: Outcome, *, output_tokens: int = 0, retry_after_s: float = 0.0
    ) -> None:
        was_ready = sent.backend.is_ready
        self.dispatcher.release(sent, outcome, self.clock(), output_tokens=output_tokens, retry_after_s=retry_after_s)
        if outcome == "unavailable" and was_ready and not sent.backend.is_ready:
            logger.warning("replica %s is unavailable: its requests wait, or go to others", sent.backend.id)
        self._deliver()

    def confirm_failure(self, sent: InFlightRequest) -> None:
        self.dispatcher.confirm_failure(sent, self.clock())
        self._deliver()

    # Futures and the timer.

    def _deliver(self) -> None:
        """Resolve the futures of requests that were sent or rejected, and set the timer for the next deadline."""
        while decided := self.dispatcher.take_decided():
            for queued in decided:
                future, outcome = self._futures.pop(queued), queued.outcome
                if isinstance(outcome, InFlightRequest):
                    if future.done():  # its client has just disconnected
                        self.dispatcher.release(outcome, "unsent", self.clock())
                    else:
                        future.set_result(outcome)
                elif isinstance(outcome, PoolError) and not future.done():
                    future.set_exception(outcome)
        due_s = self.dispatcher.next_deadline()
        if due_s is None or (self._timer is not None and self._timer_due_s <= due_s):
            return
        if self._timer is not None:
            self._timer.cancel()
        delay_s = max(due_s - self.clock(), 0.0)
        self._timer, self._timer_due_s = asyncio.get_running_loop().call_later(delay_s, self._wake), due_s

    def _wake(self) -> None:
        self._timer = None
        self.dispatcher.tick(max(self.clock(), self._timer_due_s))  # a timer may fire early by the clock's resolution
        self._deliver()

    def _abandon(self, queued: QueuedRequest, future: asyncio.Future[InFlightRequest]) -> None:
        """The client disconnected while its request was queued, or just as it was dispatched."""
        if self._futures.pop(queued, None) is not None:
            self.dispatcher.cancel(queued, self.clock())
        elif future.done() and not future.cancelled() and future.exception() is None:
            self.dispatcher.release(future.result(), "unsent", self.clock())
        self._deliver()


class Lease:
    """A request's slot at a replica, from dispatch until `close`."""

    __slots__ = ("_pool", "in_flight", "replica", "request")

    def __init__(self, pool: Pool, sent: InFlightRequest, request: GatewayRequest, replica: ReplicaAddress) -> None:
        self._pool = pool
        self.in_flight, self.request, self.replica = sent, request, replica

    @property
    def queue_s(self) -> float:
        """Seconds that the request was queued."""
        return self.in_flight.queue_s

    @property
    def is_lost(self) -> bool:
        """Whether the replica was found dead or hung: no more data will come."""
        return self.in_flight.is_lost

    @property
    def may_have_hung_replica(self) -> bool:
        """Whether the request was sent before the replica's last sign of life, or before the probe that was due after
        it. Sent later, it got to a replica that hung already.
        """
        return self.in_flight.sent_s <= self.in_flight.backend.alive_s + self._pool.options.probe_interval_s

    @property
    def was_alone(self) -> bool:
        """Whether no other request was in flight at the replica when this one failed."""
        return self.in_flight.was_alone

    @property
    def was_quarantined(self) -> bool:
        """Whether no other request in quarantine was in flight when this one failed."""
        return self.in_flight.request.is_quarantined and not self.in_flight.has_first_token

    def when_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when the lease is lost; at once if it already is. Only one callback is kept."""
        if self.in_flight.is_lost:
            callback()
        else:
            self.in_flight.on_lost = callback

    def received(self) -> None:
        """Bytes arrived on the socket, of any kind."""
        self.in_flight.backend.received(self._pool.clock())

    def paused(self) -> None:
        """Reading from the socket is paused."""
        self.in_flight.backend.paused(self.in_flight)

    def resumed(self) -> None:
        """Reading from the socket has resumed."""
        self.in_flight.backend.resumed(self.in_flight, self._pool.clock())

    def progress(self) -> None:
        """A part of the response arrived."""
        self.in_flight.backend.progressed(self.in_flight, self._pool.clock())

    def first_token(self, prompt_tokens: int | None = None) -> None:
        """The prefill is done. prompt_tokens: the replica's count."""
        self._pool.dispatcher.first_token(self.in_flight, self._pool.clock(), prompt_tokens)

    def close(self, outcome: Outcome, *, output_tokens: int = 0, retry_after_s: float = 0.0) -> None:
        """Free the slot. Only the first call has an effect. `confirm_failure` may follow on "unconfirmed".

        output_tokens: tokens generated. retry_after_s: the Retry-After of a replica that rejected the request.
        """
        self._pool.release(self.in_flight, outcome, output_tokens=output_tokens, retry_after_s=retry_after_s)

    def confirm_failure(self) -> None:
        """The lease was closed as "unconfirmed", and the replica turned out to be at fault."""
        self._pool.confirm_failure(self.in_flight)


def _spec(address: ReplicaAddress) -> BackendSpec:
    return BackendSpec(
        id=address.id,
        max_num_seqs=address.max_num_seqs,
        weight=address.weight,
        max_prompt_tokens=address.max_prompt_tokens,
        draining=address.draining,
    )


def _replica_snapshot(backend: Backend, now_s: float) -> ReplicaSnapshot:
    load, in_flight = backend.load, backend.in_flight
    return ReplicaSnapshot(
        id=backend.id,
        state=backend.state,
        inflight=len(in_flight),
        running=len(in_flight) if load.running is None else load.running,
        waiting=load.waiting or 0,
        kv_usage=load.kv_usage,
        silent_s=backend.silence_s(now_s),
        ejected_for_s=max(backend.ejected_until_s - now_s, backend.breaker.open_until_s - now_s, 0.0),
        ejections=backend.ejections + backend.breaker.ejections,
        last_errors=tuple(backend.errors),
    )
