"""The queue for backends: by priority, and within a priority every tenant gets the same share of tokens.

    priority 0 ── tenant a ── r1 r4 r5      tag 300 = 220 used + 80 in flight   ◄ next: the lowest tag
               └─ tenant b ── r2            tag 820
    priority 5 ── tenant a ── r3            waits for all above

Fair queuing with tokens as the cost, as in the Virtual Token Counter (Sheng et al., "Fairness in serving large
language models", OSDI 2024). A tenant's tag is the tokens it has used plus the upper bound of its requests in flight.
When an idle tenant becomes active, its counter is raised to the lowest one among active tenants, so idle time earns no
credit. Only used tokens count for that, not the upper bounds that other tenants declare. Requests of one tenant keep
their order. A tenant uses at most `MAX_LEVELS` priorities at a time, so that no client makes the others' lookups long.
"""

from __future__ import annotations

import heapq
from bisect import bisect, bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice

from powerband.dispatch.backend import InFlightRequest
from powerband.dispatch.errors import PoolError
from powerband.dispatch.request import DispatchRequest, PriorityLevel

MAX_LEVELS = 8  # priority levels that one tenant's requests may use at a time
_MAX_IDLE_LEVELS = 64  # priority levels kept before idle ones are dropped
_MAX_IDLE_TENANTS = 4096  # likewise
_MAX_SAMPLED = 64  # tenants sampled to estimate the tokens ahead of a request


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A request in the queue. Afterwards `outcome` says where it was sent or why it was rejected."""

    request: DispatchRequest
    tokens: int
    level: PriorityLevel
    queued_s: float
    avoid: frozenset[str] = frozenset()  # backends that failed with it
    num_passed: int = 0  # how often a later request of its tenant went first
    is_queued: bool = False
    outcome: InFlightRequest | PoolError | None = None


class _Tenant:
    """One tenant at one priority: its queued requests, and the tokens it has used and may still use."""

    __slots__ = ("in_flight", "in_flight_tokens", "is_in_usage_heap", "requests", "tokens", "used")

    def __init__(self) -> None:
        self.requests: OrderedDict[QueuedRequest, None] = OrderedDict()
        self.tokens = 0  # of queued requests
        self.in_flight = 0
        self.in_flight_tokens = 0.0  # upper bound
        self.used = 0.0  # tokens; only grows
        self.is_in_usage_heap = False  # has an entry in `_PriorityClass._usage_heap`

    @property
    def tag(self) -> float:
        return self.used + self.in_flight_tokens

    @property
    def is_active(self) -> bool:
        return self.in_flight > 0 or bool(self.requests)


class _PriorityClass:
    """The queued requests of one priority. `waiting`: the tenants that have any.

    Two heaps find the waiting tenant with the lowest tag and the active tenant with the lowest `used`. Neither is
    updated in place when these numbers change (lazy deletion):

    _tag_heap    (tag, order, tenant's name). A changed tag is pushed as a further entry. An entry whose tag is not its
                 tenant's current one is stale, and dropped when it comes up; the heap is rebuilt if most are stale.
    _usage_heap  (used, order, tenant), one entry per active tenant. `used` only grows, so an entry is never too high.
                 One that comes up too low is replaced, one of an idle tenant dropped.
    """

    def __init__(self) -> None:
        self.tenants: dict[str, _Tenant] = {}
        self.waiting: dict[str, _Tenant] = {}
        self.tokens = 0
        self._max_tenants = _MAX_IDLE_TENANTS  # before idle tenants are dropped
        self._last_used = 0.0  # the highest `used` of a tenant that became idle
        self._tag_heap: list[tuple[float, int, str]] = []
        self._usage_heap: list[tuple[float, int, _Tenant]] = []
        self._order = count()  # equal tags and equal `used`: first in, first out

    def push(self, queued: QueuedRequest) -> None:
        name = queued.request.tenant
        tenant = self._activate(name)
        is_first = not tenant.requests
        tenant.requests[queued] = None
        tenant.tokens += queued.tokens
        self.tokens += queued.tokens
        if is_first:
            self.waiting[name] = tenant
            self._push_tag(name)

    def remove(self, queued: QueuedRequest) -> None:
        name = queued.request.tenant
        tenant = self.waiting[name]
        del tenant.requests[queued]
        tenant.tokens -= queued.tokens
        self.tokens -= queued.tokens
        if not tenant.requests:
            del self.waiting[name]
            self._record_idle(tenant)

    def pop(self, choose: Callable[[Iterable[QueuedRequest]], QueuedRequest | None]) -> QueuedRequest | None:
        skipped: list[tuple[float, int, str]] = []
        found = None
        while self._tag_heap and found is None:
            entry = heapq.heappop(self._tag_heap)
            tag, _, name = entry
            tenant = self.waiting.get(name)
            if tenant is None or tag != tenant.tag:  # stale
                continue
            found = choose(tenant.requests)
            if found is None:
                skipped.append(entry)
            else:
                self.charge(name, found.tokens)
                self.remove(found)
        for entry in skipped:
            heapq.heappush(self._tag_heap, entry)
        return found

    def charge(self, name: str, tokens: float) -> None:
        """A request with this upper bound of tokens is dispatched."""
        tenant = self._activate(name)
        tenant.in_flight += 1
        tenant.in_flight_tokens += tokens
        self._tag_changed(name, tenant)

    def settle(self, name: str, tokens: float, used: float) -> bool:
        """A request that was charged with `tokens` has ended. used: the tokens it really took. False: there is none."""
        tenant = self.tenants.get(name)
        if tenant is None or not tenant.in_flight:
            return False
        tenant.in_flight -= 1
        tenant.in_flight_tokens = tenant.in_flight_tokens - tokens if tenant.in_flight else 0.0
        tenant.used += used
        self._tag_changed(name, tenant)
        self._record_idle(tenant)
        return True

    def tokens_ahead(self, name: str) -> float:
        """Tokens ahead of a new request of this tenant, assuming that no further requests arrive."""
        own = self.tenants.get(name)
        if own is not None and own.is_active:
            tag = own.tag + own.tokens
        else:
            tag = max(own.used if own is not None else 0.0, self._least_used())
        num_sampled = min(len(self.waiting), _MAX_SAMPLED)
        ahead = 0.0
        for other in islice(self.waiting.values(), num_sampled):
            ahead += min(max(tag - other.tag, 0.0), other.tokens)
        return ahead * len(self.waiting) / num_sampled if num_sampled else 0.0

    @property
    def is_in_use(self) -> bool:
        return any(tenant.is_active for tenant in self.tenants.values())

    def _activate(self, name: str) -> _Tenant:
        tenant = self.tenants.get(name)
        if tenant is None:
            if len(self.tenants) >= self._max_tenants:
                self._drop_idle()
            tenant = self.tenants[name] = _Tenant()
        if not tenant.is_active:
            tenant.used = max(tenant.used, self._least_used())
            if not tenant.is_in_usage_heap:
                tenant.is_in_usage_heap = True
                heapq.heappush(self._usage_heap, (tenant.used, next(self._order), tenant))
        return tenant

    def _least_used(self) -> float:
        """The lowest `used` of active tenants; without any, the highest of tenants that became idle."""
        heap = self._usage_heap
        while heap:
            used, _, tenant = heap[0]
            if not tenant.is_active:
                heapq.heappop(heap)
                tenant.is_in_usage_heap = False
            elif used < tenant.used:
                heapq.heapreplace(heap, (tenant.used, next(self._order), tenant))
            else:
                return used
        return self._last_used

    def _record_idle(self, tenant: _Tenant) -> None:
        if not tenant.is_active:
            self._last_used = max(self._last_used, tenant.used)

    def _tag_changed(self, name: str, tenant: _Tenant) -> None:
        if tenant.requests:
            self._push_tag(name)

    def _push_tag(self, name: str) -> None:
        """Add a waiting tenant to the heap under its current tag."""
        heapq.heappush(self._tag_heap, (self.waiting[name].tag, next(self._order), name))
        if len(self._tag_heap) > 64 + 4 * len(self.waiting):
            self._tag_heap = [(tenant.tag, next(self._order), name) for name, tenant in self.waiting.items()]
            heapq.heapify(self._tag_heap)

    def _drop_idle(self) -> None:
        """Drop idle tenants: first those whose counter would be raised anyway; if that is not enough, all of them."""
        least, active = self._least_used(), {name: one for name, one in self.tenants.items() if one.is_active}
        kept = {name: one for name, one in self.tenants.items() if one.is_active or one.used > least}
        self.tenants = active if len(kept) > _MAX_IDLE_TENANTS // 2 + len(active) else kept
        self._max_tenants = _MAX_IDLE_TENANTS + 2 * len(active)


class _Share:
    """One tenant at all priorities. requests, tokens: queued. levels: its requests, queued or in flight, by level."""

    __slots__ = ("levels", "requests", "tokens")

    def __init__(self) -> None:
        self.requests = 0
        self.tokens = 0
        self.levels: Counter[PriorityLevel] = Counter()


class FairQueue:
    """The queue of one length pool. `requests`, `tokens`: how many are queued."""

    def __init__(self) -> None:
        self.requests = 0
        self.tokens = 0
        self._levels: dict[PriorityLevel, _PriorityClass] = {}
        self._order: list[PriorityLevel] = []  # sorted
        self._max_levels = _MAX_IDLE_LEVELS  # before idle levels are dropped
        self._shares: dict[str, _Share] = {}  # of tenants with requests that are queued or in flight
        self._num_waiting = 0  # tenants with queued requests

    def __iter__(self) -> Iterator[QueuedRequest]:
        for level in self._order:
            for tenant in self._levels[level].waiting.values():
                yield from tenant.requests

    def level_for(self, tenant: str, wanted: PriorityLevel) -> PriorityLevel:
        """The level of a tenant's new request: `wanted`, unless the tenant uses `MAX_LEVELS` other ones. Then it is the
        next one of these that is served later, or the last.
        """
        share = self._shares.get(tenant)
        if share is None or wanted in share.levels:
            return wanted
        used = sorted(level for level in share.levels if level[0] == wanted[0])
        if len(used) < MAX_LEVELS:
            return wanted
        return used[min(bisect(used, wanted), len(used) - 1)]

    def push(self, queued: QueuedRequest) -> None:
        self._level(queued.level).push(queued)
        queued.is_queued = True
        self.requests += 1
        self.tokens += queued.tokens
        share = self._began(queued.level, queued.request.tenant)
        self._num_waiting += not share.requests
        share.requests += 1
        share.tokens += queued.tokens

    def remove(self, queued: QueuedRequest) -> None:
        """Remove a request without dispatching it. Does nothing if it has left the queue."""
        if queued.is_queued:
            self._levels[queued.level].remove(queued)
            self._uncount(queued)
            self._ended(queued.level, queued.request.tenant)

    def pop(self, choose: Callable[[Iterable[QueuedRequest]], QueuedRequest | None]) -> QueuedRequest | None:
        """Take the next request. choose: gets each tenant's requests, lowest tag first; returns one of them or None."""
        for name in self._order:
            level = self._levels[name]
            if level.waiting:
                found = level.pop(choose)
                if found is not None:
                    self._uncount(found)
                    return found
        return None

    def charge(self, level: PriorityLevel, tenant: str, tokens: float) -> None:
        """A request with this upper bound of tokens is dispatched without queueing."""
        self._level(level).charge(tenant, tokens)
        self._began(level, tenant)

    def settle(self, level: PriorityLevel, tenant: str, tokens: float, used: float) -> None:
        """A request that was charged or queued with `tokens` has ended. used: the tokens it really took."""
        if level in self._levels and self._levels[level].settle(tenant, tokens, used):
            self._ended(level, tenant)

    def share_of(self, tenant: str) -> tuple[int, int, int]:
        """The tenant's queued requests, their tokens, and the number of waiting tenants including this one."""
        share = self._shares.get(tenant) or _Share()
        return share.requests, share.tokens, self._num_waiting + (not share.requests)

    def tokens_ahead(self, level: PriorityLevel, tenant: str) -> float:
        """Tokens ahead of a new request, assuming that no further requests arrive."""
        if not self.requests:
            return 0.0
        before = sum(self._levels[name].tokens for name in islice(self._order, bisect_left(self._order, level)))
        return before + (self._levels[level].tokens_ahead(tenant) if level in self._levels else 0.0)

    def _began(self, level: PriorityLevel, tenant: str) -> _Share:
        share = self._shares.setdefault(tenant, _Share())
        share.levels[level] += 1
        return share

    def _ended(self, level: PriorityLevel, tenant: str) -> None:
        share = self._shares[tenant]
        share.levels[level] -= 1
        if not share.levels[level]:
            del share.levels[level]
        if not share.levels:
            del self._shares[tenant]

    def _uncount(self, queued: QueuedRequest) -> None:
        """A request has left the queue; if it was dispatched, its tenant still uses the level."""
        queued.is_queued = False
        self.requests -= 1
        self.tokens -= queued.tokens
        share = self._shares[queued.request.tenant]
        share.requests -= 1
        share.tokens -= queued.tokens
        self._num_waiting -= not share.requests

    def _level(self, name: PriorityLevel) -> _PriorityClass:
        level = self._levels.get(name)
        if level is None:
            if len(self._levels) >= self._max_levels:
                self._levels = {known: old for known, old in self._levels.items() if old.is_in_use}
                self._order = sorted(self._levels)
                self._max_levels = _MAX_IDLE_LEVELS + 2 * len(self._levels)
            level = self._levels[name] = _PriorityClass()
            insort(self._order, name)
        return level
