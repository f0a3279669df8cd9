"""Which replica a request goes to, and when: requests wait here, and nowhere else, until a replica has a place.

    lease(request) ─► admitted? ─► a place is free ─────────────────► Lease ── close ─► its place goes to who is next
                        │ no         └ none: queue (fair, bounded) ──┘
                        └─► PoolFull, DeadlineInfeasible, NoReplica        ... or Expired

A replica has max_num_seqs places and a few more, so that it never runs dry; whatever else waits can still go to any
replica, also to one that comes up only now. One event loop owns it all. Only `lease` waits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from functools import partial
from itertools import islice

from powerband.gateway.dispatch.breaker import RetryBudgets
from powerband.gateway.dispatch.lanes import Lane, arrange, lane_of
from powerband.gateway.dispatch.lease import Lease, Outcome
from powerband.gateway.dispatch.member import Member
from powerband.gateway.dispatch.pool_errors import (
    DeadlineInfeasible,
    Expired,
    NoReplica,
    PoolFull,
    Refusal,
    ReplicasBusy,
)
from powerband.gateway.dispatch.queue import Level, Ticket
from powerband.gateway.dispatch.routing import make_router
from powerband.gateway.engine_names import Load
from powerband.gateway.pool_options import PoolOptions
from powerband.gateway.request import GatewayRequest
from powerband.gateway.routes import ModelRoute
from powerband.gateway.snapshot import PoolSnapshot

__all__ = ["DeadlineInfeasible", "Expired", "Lease", "NoReplica", "Pool", "PoolFull", "PoolOptions", "Refusal"]

logger = logging.getLogger(__name__)

NO_REPLICA_RETRY_S = 5.0
_WELL_S = 60.0  # that a good answer of a replica shows it to be well
_MAX_PAUSE_S = 5.0  # that a request waits for replicas which asked to be left alone; else its client is told to wait
_REPLACEMENT_S = 15.0  # without any replica, one is expected for so long


class Pool:
    """The replicas of one served model. clock: seconds, monotonic; the event loop's timers must follow it."""

    def __init__(self, options: PoolOptions | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.options = options or PoolOptions()
        self.clock = clock
        self.model = ""
        self._members: dict[str, Member] = {}
        self._leaving: list[Member] = []  # no longer in the routes, but still answering
        self._lanes = arrange((), (), self.options)
        self._router = make_router(self.options)
        self._retries = RetryBudgets(self.options)
        self._live: Counter[str] = Counter()  # leases, by tenant
        self._had_replica_s = -_REPLACEMENT_S

    # For the gateway.

    def update(self, route: ModelRoute) -> None:
        """These are the replicas now. Those that stay keep their state; what waits may go to any."""
        now_s = self.clock()
        self.model = route.name
        if any(not member.address.draining for member in self._members.values()):
            self._had_replica_s = now_s
        members: dict[str, Member] = {}
        for address in route.replicas:
            member = self._members.pop(address.id, None) or Member(address, self.options, now_s)
            if member.address.max_num_seqs != address.max_num_seqs or member.address.url != address.url:
                member.address = address
                member.limit = member.most
            member.address = address
            members[address.id] = member
        for member in self._members.values():
            member.is_removed = True
            self._router.forget(member.id)
            if member.stays:
                self._leaving.append(member)
        self._members = members
        self._changed(now_s)
        for lane in self._lanes:
            lane.admission.capacity.planned = route.rate / len(members) if route.rate and members else None
            lane.admission.slo_ttft_s = None if route.slo is None else route.slo.ttft_s

    async def lease(self, request: GatewayRequest, *, avoid: Collection[str] = ()) -> Lease:
        """Wait for a place. avoid: replicas that it was with, to be chosen only if there are no others.

        Raises PoolFull, DeadlineInfeasible and NoReplica at once, Expired after a wait. Cancelling it leaves the queue.
        """
        now_s = self.clock()
        lane = lane_of(request, self._lanes)
        # Who was accepted once is not sent to the end of the line.
        level = (0 if avoid else 1, request.priority)
        lease = None if lane.queue.requests else self._send_at_once(request, avoid, lane, level, now_s)
        if lease is not None:
            return lease
        ticket = self._queue(request, lane, level, frozenset(avoid), now_s)
        try:
            placed: Lease = await ticket.future
        except asyncio.CancelledError:
            self._abandon(ticket)
            raise
        finally:
            ticket.timer.cancel()
        placed.queue_s = self.clock() - now_s
        return placed

    def may_retry(self, lease: Lease) -> bool:
        """Take another try from the budget of the request's tenant, after this one failed.

        Requests that may be at fault themselves have a budget of their own. Where the replica is known to be gone, the
        try is free: a replica's death costs one each, and makes no storm.
        """
        if lease.is_without_replica:
            self._retries.taken += 1
            return True
        tenant = lease.request.tenant
        return self._retries.take(self.clock(), self._live[tenant], (tenant, lease.is_suspected))

    def are_well(self, ids: Iterable[str]) -> bool:
        """Whether each of these replicas ended an answer well in the last minute."""
        since_s = self.clock() - _WELL_S
        members = [self._members.get(id) for id in ids]
        return all(one is not None and one.answered_s is not None and one.answered_s >= since_s for one in members)

    def has_others(self, than: Collection[str]) -> bool:
        """Whether any other replica takes requests."""
        return any(member.takes_new and member.id not in than for member in self._members.values())

    def may_log(self, id: str) -> bool:
        """Whether it is time for another line about what this replica answers."""
        member = self._members.get(id)
        return member is not None and member.may_log(self.clock())

    def snapshot(self) -> PoolSnapshot:
        now_s = self.clock()
        waits = (lane.admission.capacity.wait_s(lane.queue.tokens, lane.queue.requests) for lane in self._lanes)
        return PoolSnapshot(
            model=self.model,
            queued=self.queued,
            queued_tokens=self.queued_tokens,
            predicted_wait_s=max(wait_s or 0.0 for wait_s in waits),
            retries=self._retries.taken,
            replicas=tuple(member.snapshot(now_s) for member in self._members.values()),
        )

    def close(self) -> None:
        """Nobody waits any more."""
        self._fail_all("The gateway is ending.")

    @property
    def queued(self) -> int:
        return sum(lane.queue.requests for lane in self._lanes)

    @property
    def queued_tokens(self) -> int:
        return sum(lane.queue.tokens for lane in self._lanes)

    @property
    def is_ready(self) -> bool:
        """Whether any replica takes requests."""
        return any(member.takes_new for member in self._members.values())

    # For the prober.

    @property
    def members(self) -> Iterable[Member]:
        """Those to be probed: also the ones that only end what they have."""
        return [*self._members.values(), *self._leaving]

    def changed(self, member: Member) -> None:
        """A probe or its metrics changed what it takes."""
        self._changed(self.clock())
        if not member.is_ready:
            self._router.forget(member.id)

    def restarted(self, member: Member) -> None:
        """Its engine is another process now."""
        member.restarted()
        self._router.forget(member.id)

    def hung(self, member: Member) -> None:
        """It says that it is well, but nothing comes."""
        member.errors.append("hung")
        if member.is_ready and self._may_open():
            member.breaker.trip(self.clock())
        member.lose_all()

    def reported(self, member: Member, load: Load) -> None:
        """What a replica's metrics say."""
        before = member.load.tokens
        if load.tokens is not None and before is not None and load.tokens < before:  # it counts anew
            self.restarted(member)
        member.reported(load)
        self._dispatch(self.clock())

    def tick(self) -> None:
        """Time has passed: breakers may be over, and waiting in vain too."""
        now_s = self.clock()
        self._leaving = [member for member in self._leaving if member.stays]
        is_whole = all(member.takes_new and member.breaker.is_closed for member in self._members.values())
        for lane in self._lanes:
            lane.admission.watch(lane.queue, now_s, is_whole=is_whole)
            if lane.admission.is_overload:  # some were let in before it was one
                for ticket in tuple(lane.queue):
                    if not ticket.avoid and lane.admission.is_late(ticket.request, now_s):
                        self._expire(ticket)
        if self.queued:
            if self._is_hopeless(now_s):
                self._fail_all("No replica is ready, and none is expected.")
            self._dispatch(now_s)

    # For leases.

    def first_token_came(self, lease: Lease, ttft_s: float) -> None:
        lease.stay.tokens -= lease.request.prompt_tokens
        lease.member.outstanding -= lease.request.prompt_tokens
        lane_of(lease.request, self._lanes).admission.service.observe(ttft_s)

    def release(self, lease: Lease, outcome: Outcome, output_tokens: int) -> None:
        now_s, member, request = self.clock(), lease.member, lease.request
        lane = lane_of(request, self._lanes)
        self._live[request.tenant] -= 1
        if not self._live[request.tenant]:
            del self._live[request.tenant]
        member.stays.discard(lease.stay)
        member.outstanding -= lease.stay.tokens
        is_done = outcome in ("ok", "left")
        if is_done:
            lane.observe(now_s)
            lane.admission.capacity.ended(lease.tokens, now_s - lease.since_s)
            member.answered()
            if outcome == "ok":
                member.answered_s = now_s
        elif outcome == "refused":
            member.refused(now_s)
        elif outcome == "absent":
            if member.found_absent(now_s, "absent"):
                logger.warning("replica %s is not there: requests wait for it, or go elsewhere", member.id)
                self._router.forget(member.id)
                self._changed(now_s)
        elif outcome == "failed":
            member.errors.append("failed")
        # What the tenant did not get, it does not pay for.
        paid = lease.prompt_tokens + output_tokens if is_done else 0
        lane.queue.settle(lease.level, request.tenant, paid - lease.tokens)
        # Of a replica that was found dead, its probes have said so.
        is_ok = None if outcome in ("left", "refused", "suspected", "absent") or lease.lost else outcome == "ok"
        member.breaker.ended(now_s, is_ok, is_trial=lease.is_trial, may_open=is_ok is False and self._may_open())
        if self.queued:
            self._dispatch(now_s)

    def _may_open(self) -> bool:
        """One more breaker: at most half of the replicas may be out for their failures, and never all."""
        taking = [member for member in self._members.values() if member.takes_new]
        num_open = sum(not member.breaker.is_closed for member in taking)
        return num_open + 1 <= len(taking) // 2

    def blame(self, lease: Lease) -> None:
        """A request that was suspected is fine elsewhere: its replica was at fault."""
        member = lease.member
        member.errors.append("failed")
        member.breaker.ended(self.clock(), False, is_trial=lease.is_trial, may_open=self._may_open())

    # Who goes where.

    def _changed(self, now_s: float) -> None:
        self._lanes = arrange(self._lanes, self._members.values(), self.options)
        self._dispatch(now_s)

    def _dispatch(self, now_s: float) -> None:
        for lane in self._lanes:
            while lane.queue.requests:
                free = [member for member in lane.serving if member.has_place(now_s)]
                ticket = lane.queue.pop(partial(self._pick, free, lane.serving)) if free else None
                if ticket is None:
                    break
                self._serve(ticket, lane, free, now_s)
            lane.observe(now_s)

    def _serve(self, ticket: Ticket, lane: Lane, free: list[Member], now_s: float) -> None:
        if ticket.future.done():  # cancelled, and about to say so
            lane.queue.settle(ticket.level, ticket.request.tenant, -ticket.tokens)
            return
        among = _without(ticket.avoid, free, lane.serving)
        member = self._router.choose(ticket.request, among, lane.serving)
        ticket.future.set_result(self._send(ticket.request, member, lane, ticket.level, now_s))

    def _pick(self, free: list[Member], serving: list[Member], tickets: Iterable[Ticket]) -> Ticket | None:
        """Of one tenant's requests the first, or one soon after it that suits the only free replica better."""
        first = next(iter(tickets))
        if not _without(first.avoid, free, serving):
            return None
        if len(free) > 1 or len(serving) == 1 or first.passed >= self.options.look_ahead:
            return first
        best, gain = first, self._router.suits(first.request, free[0])
        for ticket in islice(tickets, 1, self.options.look_ahead):
            if gain < 1 and not ticket.avoid and (better := self._router.suits(ticket.request, free[0])) > gain:
                best, gain = ticket, better
        if best is not first:
            first.passed += 1
        return best

    def _send(self, request: GatewayRequest, member: Member, lane: Lane, level: Level, now_s: float) -> Lease:
        lease = Lease(self, member, request, level, now_s)
        member.stays.add(lease.stay)
        member.outstanding += lease.tokens
        self._live[request.tenant] += 1
        self._router.sent(request, member)
        lane.admission.capacity.dispatched()
        return lease

    def _send_at_once(
        self, request: GatewayRequest, avoid: Collection[str], lane: Lane, level: Level, now_s: float
    ) -> Lease | None:
        free = _without(avoid, [member for member in lane.serving if member.has_place(now_s)], lane.serving)
        if not free:
            return None
        if not avoid:
            lane.admission.check_late(request, now_s)
        member = self._router.choose(request, free, lane.serving)
        lane.queue.charge(level, request.tenant, request.prompt_tokens + request.output_tokens)
        return self._send(request, member, lane, level, now_s)

    # Who waits, and how that ends.

    def _queue(self, request: GatewayRequest, lane: Lane, level: Level, avoid: frozenset[str], now_s: float) -> Ticket:
        """Raises what refuses it. Who was accepted before is refused only when no replica is left."""
        if self._is_hopeless(now_s):
            raise NoReplica("No replica is ready, and none is expected.", retry_after_s=NO_REPLICA_RETRY_S)
        self._check_pauses(lane, avoid, now_s)
        if avoid:
            expires_s = now_s + self.options.longest_wait_s
            if request.deadline_s is not None:
                expires_s = min(expires_s, max(request.deadline_s, now_s))
        else:
            waiting = (self.queued, self.queued_tokens)
            expires_s = lane.admission.admit(request, level, lane.queue, now_s, waiting)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Lease] = loop.create_future()
        ticket = Ticket(request, request.prompt_tokens + request.output_tokens, level, now_s, avoid, future)
        ticket.timer = loop.call_later(expires_s - now_s, self._expire, ticket)
        lane.queue.push(ticket)
        self._dispatch(now_s)
        return ticket

    def _check_pauses(self, lane: Lane, avoid: Collection[str], now_s: float) -> None:
        """Raise ReplicasBusy when every replica has asked for a longer pause than a request waits for."""
        pauses_s = [member.busy_until_s - now_s for member in _without(avoid, lane.serving, lane.serving)]
        if pauses_s and (pause_s := min(pauses_s)) > _MAX_PAUSE_S:
            raise ReplicasBusy(
                f"Every replica has asked for a pause (Retry-After); the shortest ends in {pause_s:.0f} s.",
                retry_after_s=pause_s,
            )

    def _is_hopeless(self, now_s: float) -> bool:
        """Whether no replica takes requests, and none has begun to start, or to recover, lately."""
        staying = [member for member in self._members.values() if not member.address.draining]
        if any(member.is_ready or now_s - member.since_s < self.options.longest_wait_s for member in staying):
            return False
        return bool(staying) or now_s - self._had_replica_s > _REPLACEMENT_S

    def _expire(self, ticket: Ticket) -> None:
        if ticket.is_queued and not ticket.future.done():
            lane, now_s = self._leave(ticket)
            ticket.future.set_exception(lane.admission.expired(now_s - ticket.queued_s))

    def _abandon(self, ticket: Ticket) -> None:
        """Its client left while it waited, or in the moment in which it got its place."""
        future = ticket.future
        if ticket.is_queued:
            self._leave(ticket)
        elif future.done() and not future.cancelled() and future.exception() is None:
            future.result().close("left")

    def _leave(self, ticket: Ticket) -> tuple[Lane, float]:
        lane, now_s = lane_of(ticket.request, self._lanes), self.clock()
        lane.queue.remove(ticket)
        lane.observe(now_s)
        return lane, now_s

    def _fail_all(self, why: str) -> None:
        for ticket in [ticket for lane in self._lanes for ticket in lane.queue]:
            self._leave(ticket)
            if not ticket.future.done():
                ticket.future.set_exception(NoReplica(why, retry_after_s=NO_REPLICA_RETRY_S))


def _without(avoid: Collection[str], free: list[Member], serving: list[Member]) -> list[Member]:
    """The free ones that are not to be avoided; if all there are should be, the free ones."""
    if not avoid:
        return free
    if all(member.id in avoid for member in serving):
        return free
    return [member for member in free if member.id not in avoid]
