"""The dispatcher of one served model on an asyncio event loop: its timers, futures of requests that wait, and leases.

One event loop owns it all. Only `lease` waits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable

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
        self._futures: dict[QueuedRequest, asyncio.Future[InFlightRequest]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due_s = 0.0

    # For the gateway.

    def update(self, route: ModelRoute) -> None:
        """These are the replicas now. Those that stay keep their state; requests that wait may go to any."""
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
        self._deliver()

    async def lease(self, request: GatewayRequest, *, avoid: Collection[str] = ()) -> Lease:
        """Wait for a place. avoid: replicas that failed with it, to be chosen only if there are no others.

        Raises PoolFull, DeadlineUnreachable and NoReplicaAvailable at once, QueueTimeout after a wait. Cancelling it
        leaves the queue.
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
        """Take another attempt from the budget of the request's tenant, after this one failed."""
        return self.dispatcher.may_retry(lease.in_flight, self.clock())

    def are_healthy(self, ids: Iterable[str]) -> bool:
        """Whether each of these replicas completed a request in the last minute."""
        return self.dispatcher.are_healthy(ids, self.clock())

    def has_others(self, than: Collection[str]) -> bool:
        """Whether any other replica takes requests."""
        return self.dispatcher.has_others(than)

    def may_log(self, id: str) -> bool:
        """Whether another line about this replica's responses is due."""
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
        """Refuse the requests that wait."""
        self.dispatcher.refuse_all("The gateway is ending.", self.clock())
        self._deliver()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # For the prober.

    @property
    def backends(self) -> list[Backend]:
        """Those to be probed: also the ones that only end what they have."""
        return self.dispatcher.backends

    @property
    def is_ready(self) -> bool:
        """Whether any replica takes requests."""
        return self.dispatcher.is_ready

    def address(self, backend: Backend) -> ReplicaAddress:
        return self._addresses[backend.id]

    def changed(self, backend: Backend) -> None:
        """A probe made it ready, or ejected it."""
        self.dispatcher.changed(backend, self.clock())
        self._deliver()

    def restarted(self, backend: Backend) -> None:
        """Its engine is another process now."""
        self.dispatcher.restarted(backend, self.clock())

    def hung(self, backend: Backend) -> None:
        """Its probes are good, but nothing comes."""
        self.dispatcher.hung(backend, self.clock())
        self._deliver()

    def reported(self, backend: Backend, load: ReplicaLoad) -> None:
        """What a replica's metrics show."""
        self.dispatcher.reported(backend, load, self.clock())
        self._deliver()

    # For leases.

    def release(self, sent: InFlightRequest, outcome: Outcome, *, output_tokens: int = 0, pause_s: float = 0.0) -> None:
        was_ready = sent.backend.is_ready
        self.dispatcher.release(sent, outcome, self.clock(), output_tokens=output_tokens, pause_s=pause_s)
        if outcome == "absent" and was_ready and not sent.backend.is_ready:
            logger.warning("replica %s is not there: requests wait for it, or go elsewhere", sent.backend.id)
        self._deliver()

    def blame(self, sent: InFlightRequest) -> None:
        self.dispatcher.blame(sent, self.clock())
        self._deliver()

    # Futures and the timer.

    def _deliver(self) -> None:
        """Resolve the futures of requests that were sent or refused, and set the timer for the next deadline."""
        while decided := self.dispatcher.take_decided():
            for queued in decided:
                future, outcome = self._futures.pop(queued), queued.outcome
                if isinstance(outcome, InFlightRequest):
                    if future.done():  # its client has just left
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
        self.dispatcher.tick(max(self.clock(), self._timer_due_s))  # timers may be early by the clock's resolution
        self._deliver()

    def _abandon(self, queued: QueuedRequest, future: asyncio.Future[InFlightRequest]) -> None:
        """Its client left while it waited, or in the moment in which it got its place."""
        if self._futures.pop(queued, None) is not None:
            self.dispatcher.cancel(queued, self.clock())
        elif future.done() and not future.cancelled() and future.exception() is None:
            self.dispatcher.release(future.result(), "unsent", self.clock())
        self._deliver()


class Lease:
    """A request's place with a replica, from dispatch until `close`."""

    __slots__ = ("_pool", "in_flight", "replica", "request")

    def __init__(self, pool: Pool, sent: InFlightRequest, request: GatewayRequest, replica: ReplicaAddress) -> None:
        self._pool = pool
        self.in_flight, self.request, self.replica = sent, request, replica

    @property
    def queue_s(self) -> float:
        """Seconds that the request waited for it."""
        return self.in_flight.queue_s

    @property
    def is_lost(self) -> bool:
        """The replica was found dead or hung while this ran: nothing more will come."""
        return self.in_flight.is_lost

    def when_lost(self, callback: Callable[[], None]) -> None:
        """Call back once, from the event loop; at once if that is so already. One callback at most."""
        if self.in_flight.is_lost:
            callback()
        else:
            self.in_flight.on_lost = callback

    def received(self) -> None:
        """Bytes of any kind came."""
        self.in_flight.backend.received(self._pool.clock())

    def paused(self) -> None:
        """The socket is not read for now."""
        self.in_flight.backend.paused(self.in_flight)

    def resumed(self) -> None:
        """The socket is read again."""
        self.in_flight.backend.resumed(self.in_flight, self._pool.clock())

    def progress(self) -> None:
        """A part of the answer came."""
        self.in_flight.backend.progressed(self.in_flight, self._pool.clock())

    def first_token(self, prompt_tokens: int | None = None) -> None:
        """The prompt is computed. prompt_tokens: as the replica counted them."""
        self._pool.dispatcher.first_token(self.in_flight, self._pool.clock(), prompt_tokens)

    def close(self, outcome: Outcome, *, output_tokens: int = 0, pause_s: float = 0.0) -> None:
        """The first call counts. output_tokens: that were generated. pause_s: for which a replica that refused it
        wants no other. `blame` may follow on "suspected".
        """
        self._pool.release(self.in_flight, outcome, output_tokens=output_tokens, pause_s=pause_s)

    def blame(self) -> None:
        """It was closed as suspected, and the replica was at fault."""
        self._pool.blame(self.in_flight)


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
