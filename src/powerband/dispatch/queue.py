"""Requests that wait for a backend: by priority, and within a priority each tenant gets the same share of tokens.

    priority 0 ── tenant a ── r1 r4 r5      tag 300   ◄ next: the lowest tag
               └─ tenant b ── r2            tag 820
    priority 5 ── tenant a ── r3            waits for all above

Start-time fair queuing (Goyal et al., SIGCOMM 1996) with tokens as the cost: a tenant's tag grows by the tokens that
are dispatched for it, and is corrected when a request turns out shorter than it might have been. A tenant that was
idle starts level with the one that is served now: idle time earns nothing. Requests of one tenant keep their order.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice

from powerband.dispatch.backend import InFlightRequest
from powerband.dispatch.errors import PoolError
from powerband.dispatch.request import DispatchRequest, PriorityLevel

_MAX_IDLE_LEVELS = 64  # priority levels without requests that are remembered
_MAX_IDLE_TENANTS = 4096  # likewise
_MAX_SAMPLED = 64  # tenants, when the tokens ahead of a request are estimated


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A request that waits for a backend, until `outcome` says where it was sent or why it was refused."""

    request: DispatchRequest
    tokens: int
    level: PriorityLevel
    queued_s: float
    avoid: frozenset[str] = frozenset()  # backends that failed with it
    num_passed: int = 0  # times that a later request of its tenant went first
    is_queued: bool = False
    outcome: InFlightRequest | PoolError | None = None


class _TenantQueue:
    """Waiting requests of one tenant at one priority."""

    __slots__ = ("requests", "tokens")

    def __init__(self) -> None:
        self.requests: OrderedDict[QueuedRequest, None] = OrderedDict()
        self.tokens = 0


class _PriorityClass:
    """Waiting requests of one priority."""

    def __init__(self) -> None:
        self.tenants: dict[str, _TenantQueue] = {}
        self.tags: dict[str, float] = {}
        self.tokens = 0
        self._virtual_time = 0.0  # the tag of the request that was served last
        self._heap: list[tuple[float, int, str]] = []  # entries whose tag is not the tenant's are out of date
        self._order = count()

    def push(self, queued: QueuedRequest) -> None:
        tenant = queued.request.tenant
        waiting = self.tenants.get(tenant)
        if waiting is None:
            waiting = self.tenants[tenant] = _TenantQueue()
            self.tags[tenant] = max(self.tags.get(tenant, 0.0), self._virtual_time)
            self._offer(tenant)
        waiting.requests[queued] = None
        waiting.tokens += queued.tokens
        self.tokens += queued.tokens

    def remove(self, queued: QueuedRequest) -> None:
        tenant = queued.request.tenant
        waiting = self.tenants[tenant]
        del waiting.requests[queued]
        waiting.tokens -= queued.tokens
        self.tokens -= queued.tokens
        if not waiting.requests:
            del self.tenants[tenant]

    def pop(self, choose: Callable[[Iterable[QueuedRequest]], QueuedRequest | None]) -> QueuedRequest | None:
        skipped: list[tuple[float, int, str]] = []
        found = None
        while self._heap and found is None:
            entry = heapq.heappop(self._heap)
            tag, _, tenant = entry
            waiting = self.tenants.get(tenant)
            if waiting is None or tag != self.tags[tenant]:
                continue
            found = choose(waiting.requests)
            if found is None:
                skipped.append(entry)
            else:
                self.remove(found)
                self._virtual_time = max(self._virtual_time, tag)
                self.tags[tenant] = tag + found.tokens
                self._changed(tenant)
        for entry in skipped:
            heapq.heappush(self._heap, entry)
        return found

    def charge(self, tenant: str, tokens: float) -> None:
        """A request of so many tokens is dispatched without having waited."""
        self._virtual_time = max(self.tags.get(tenant, 0.0), self._virtual_time)
        self.tags[tenant] = self._virtual_time + tokens
        self._changed(tenant)

    def settle(self, tenant: str, difference: float) -> None:
        """The tenant got so many tokens more than it was charged."""
        if difference and tenant in self.tags:
            self.tags[tenant] += difference
            self._changed(tenant)

    def tokens_ahead(self, tenant: str) -> float:
        """Tokens ahead of a new request of this tenant, if no request came after it."""
        own = self.tenants.get(tenant)
        tag = self.tags[tenant] + own.tokens if own else max(self.tags.get(tenant, 0.0), self._virtual_time)
        num_sampled = min(len(self.tenants), _MAX_SAMPLED)
        ahead = 0.0
        for other, waiting in islice(self.tenants.items(), num_sampled):
            ahead += min(max(tag - self.tags[other], 0.0), waiting.tokens)
        return ahead * len(self.tenants) / num_sampled if num_sampled else 0.0

    def _changed(self, tenant: str) -> None:
        if tenant in self.tenants:
            self._offer(tenant)
        elif len(self.tags) > _MAX_IDLE_TENANTS + len(self.tenants):
            self._forget()

    def _offer(self, tenant: str) -> None:
        heapq.heappush(self._heap, (self.tags[tenant], next(self._order), tenant))
        if len(self._heap) > 64 + 4 * len(self.tenants):
            self._heap = [(self.tags[name], next(self._order), name) for name in self.tenants]
            heapq.heapify(self._heap)

    def _forget(self) -> None:
        """Forget idle tenants: first those that would start level anyway, and if that is not enough, all."""
        kept = {name: tag for name, tag in self.tags.items() if tag > self._virtual_time or name in self.tenants}
        if len(kept) > _MAX_IDLE_TENANTS // 2 + len(self.tenants):
            kept = {name: self.tags[name] for name in self.tenants}
        self.tags = kept


class FairQueue:
    """The queue of one length pool. `requests`, `tokens`: how many wait."""

    def __init__(self) -> None:
        self.requests = 0
        self.tokens = 0
        self._levels: dict[PriorityLevel, _PriorityClass] = {}
        self._order: list[PriorityLevel] = []

    def __iter__(self) -> Iterator[QueuedRequest]:
        for level in self._order:
            for waiting in self._levels[level].tenants.values():
                yield from waiting.requests

    def push(self, queued: QueuedRequest) -> None:
        self._level(queued.level).push(queued)
        queued.is_queued = True
        self.requests += 1
        self.tokens += queued.tokens

    def remove(self, queued: QueuedRequest) -> None:
        """Take it out without serving it. Nothing happens if it is not queued any more."""
        if queued.is_queued:
            self._levels[queued.level].remove(queued)
            self._left(queued)

    def pop(self, choose: Callable[[Iterable[QueuedRequest]], QueuedRequest | None]) -> QueuedRequest | None:
        """The next request. choose: gets each tenant's requests, the least served tenant first; returns one or None."""
        for name in self._order:
            level = self._levels[name]
            if level.tenants:
                found = level.pop(choose)
                if found is not None:
                    self._left(found)
                    return found
        return None

    def charge(self, level: PriorityLevel, tenant: str, tokens: float) -> None:
        """A request of so many tokens is dispatched without having waited."""
        self._level(level).charge(tenant, tokens)

    def settle(self, level: PriorityLevel, tenant: str, difference: float) -> None:
        """A request that was dispatched took so many tokens more than it was charged."""
        if level in self._levels:
            self._levels[level].settle(tenant, difference)

    def tokens_ahead(self, level: PriorityLevel, tenant: str) -> float:
        """Tokens ahead of a new request, if no request came after it."""
        if not self.requests:
            return 0.0
        before = sum(self._levels[name].tokens for name in self._order if name < level)
        return before + (self._levels[level].tokens_ahead(tenant) if level in self._levels else 0.0)

    def _left(self, queued: QueuedRequest) -> None:
        queued.is_queued = False
        self.requests -= 1
        self.tokens -= queued.tokens

    def _level(self, name: PriorityLevel) -> _PriorityClass:
        level = self._levels.get(name)
        if level is None:
            if len(self._levels) >= _MAX_IDLE_LEVELS:
                self._levels = {known: old for known, old in self._levels.items() if old.tenants}
            level = self._levels[name] = _PriorityClass()
            self._order = sorted(self._levels)
        return level
