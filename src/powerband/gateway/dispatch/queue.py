"""Requests that wait for a place: by priority, and within a priority each tenant gets the same share of tokens.

    priority 0 ── tenant a ── r1 r4 r5      tag 300   ◄ next: the least tag
               └─ tenant b ── r2            tag 820
    priority 5 ── tenant a ── r3            waits for all above

Start-time fair queuing (Goyal et al., SIGCOMM 1996) with tokens as the cost: a tenant's tag grows by what is dispatched
for it, and is corrected when a request turns out shorter than it might have been. A tenant that comes back starts level
with what is served now: idleness saves up nothing. Requests of one tenant keep their order.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

from powerband.gateway.request import GatewayRequest

_MOST_LEVELS = 64  # that are remembered when nobody waits in them
_MOST_TENANTS = 4096  # likewise
_LOOKED_AT = 64  # tenants, when what is ahead is estimated

# Lower is served first: whether it is new (1) or was accepted before (0), and its priority.
Level = tuple[int, int]


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that waits."""

    request: GatewayRequest
    tokens: int
    level: Level
    queued_s: float
    avoid: frozenset[str]
    future: asyncio.Future[Any]
    timer: asyncio.TimerHandle = field(init=False)
    passed: int = 0  # times that a later one of its tenant went first
    is_queued: bool = False


class _Flow:
    """What waits of one tenant."""

    __slots__ = ("tickets", "tokens")

    def __init__(self) -> None:
        self.tickets: OrderedDict[Ticket, None] = OrderedDict()
        self.tokens = 0


class _Class:
    """One priority."""

    def __init__(self) -> None:
        self.flows: dict[str, _Flow] = {}
        self.tags: dict[str, float] = {}
        self.tokens = 0
        self._now = 0.0  # the tag of what was served last
        self._heap: list[tuple[float, int, str]] = []  # holds what is out of date, too: tags say what is not
        self._order = count()

    def push(self, ticket: Ticket) -> None:
        tenant = ticket.request.tenant
        flow = self.flows.get(tenant)
        if flow is None:
            flow = self.flows[tenant] = _Flow()
            self.tags[tenant] = max(self.tags.get(tenant, 0.0), self._now)
            self._offer(tenant)
        flow.tickets[ticket] = None
        flow.tokens += ticket.tokens
        self.tokens += ticket.tokens

    def remove(self, ticket: Ticket) -> None:
        tenant = ticket.request.tenant
        flow = self.flows[tenant]
        del flow.tickets[ticket]
        flow.tokens -= ticket.tokens
        self.tokens -= ticket.tokens
        if not flow.tickets:
            del self.flows[tenant]

    def pop(self, choose: Callable[[Iterable[Ticket]], Ticket | None]) -> Ticket | None:
        skipped: list[tuple[float, int, str]] = []
        found = None
        while self._heap and found is None:
            entry = heapq.heappop(self._heap)
            tag, _, tenant = entry
            flow = self.flows.get(tenant)
            if flow is None or tag != self.tags[tenant]:
                continue
            found = choose(flow.tickets)
            if found is None:
                skipped.append(entry)
            else:
                self.remove(found)
                self._now = max(self._now, tag)
                self.tags[tenant] = tag + found.tokens
                self._changed(tenant)
        for entry in skipped:
            heapq.heappush(self._heap, entry)
        return found

    def charge(self, tenant: str, tokens: float) -> None:
        """So much is dispatched for it, and it did not wait."""
        self._now = max(self.tags.get(tenant, 0.0), self._now)
        self.tags[tenant] = self._now + tokens
        self._changed(tenant)

    def settle(self, tenant: str, difference: float) -> None:
        """It got so many tokens more than was charged."""
        if difference and tenant in self.tags:
            self.tags[tenant] += difference
            self._changed(tenant)

    def tokens_ahead(self, tenant: str) -> float:
        """Of a request that this tenant sent now, if no one else sent anything any more."""
        own = self.flows.get(tenant)
        tag = self.tags[tenant] + own.tokens if own else max(self.tags.get(tenant, 0.0), self._now)
        looked_at = min(len(self.flows), _LOOKED_AT)
        ahead = 0.0
        for other, flow in islice(self.flows.items(), looked_at):
            ahead += min(max(tag - self.tags[other], 0.0), flow.tokens)
        return ahead * len(self.flows) / looked_at if looked_at else 0.0

    def _changed(self, tenant: str) -> None:
        if tenant in self.flows:
            self._offer(tenant)
        elif len(self.tags) > _MOST_TENANTS + len(self.flows):
            self._forget()

    def _offer(self, tenant: str) -> None:
        heapq.heappush(self._heap, (self.tags[tenant], next(self._order), tenant))
        if len(self._heap) > 64 + 4 * len(self.flows):
            self._heap = [(self.tags[name], next(self._order), name) for name in self.flows]
            heapq.heapify(self._heap)

    def _forget(self) -> None:
        """Tenants that are idle: first those who would start level anyway, and if that is not enough, all."""
        kept = {name: tag for name, tag in self.tags.items() if tag > self._now or name in self.flows}
        if len(kept) > _MOST_TENANTS // 2 + len(self.flows):
            kept = {name: self.tags[name] for name in self.flows}
        self.tags = kept


class FairQueue:
    """What waits for one group of replicas. `requests`, `tokens`: how much that is."""

    def __init__(self) -> None:
        self.requests = 0
        self.tokens = 0
        self._levels: dict[Level, _Class] = {}
        self._order: list[Level] = []

    def __iter__(self) -> Iterator[Ticket]:
        for level in self._order:
            for flow in self._levels[level].flows.values():
                yield from flow.tickets

    def push(self, ticket: Ticket) -> None:
        self._level(ticket.level).push(ticket)
        ticket.is_queued = True
        self.requests += 1
        self.tokens += ticket.tokens

    def remove(self, ticket: Ticket) -> None:
        """It leaves unserved. Nothing happens if it is not there any more."""
        if ticket.is_queued:
            self._levels[ticket.level].remove(ticket)
            self._left(ticket)

    def pop(self, choose: Callable[[Iterable[Ticket]], Ticket | None]) -> Ticket | None:
        """The next one. choose: gets the tenants' tickets in turn, fairest first, and takes one of them, or none."""
        for name in self._order:
            level = self._levels[name]
            if level.flows:
                found = level.pop(choose)
                if found is not None:
                    self._left(found)
                    return found
        return None

    def charge(self, level: Level, tenant: str, tokens: float) -> None:
        """Dispatched without having waited."""
        self._level(level).charge(tenant, tokens)

    def settle(self, level: Level, tenant: str, difference: float) -> None:
        """What was dispatched took so many tokens more than it was charged."""
        if level in self._levels:
            self._levels[level].settle(tenant, difference)

    def tokens_ahead(self, level: Level, tenant: str) -> float:
        """How much would be dispatched before a request that came now, if nothing came after it."""
        if not self.requests:
            return 0.0
        before = sum(self._levels[name].tokens for name in self._order if name < level)
        return before + (self._levels[level].tokens_ahead(tenant) if level in self._levels else 0.0)

    def _left(self, ticket: Ticket) -> None:
        ticket.is_queued = False
        self.requests -= 1
        self.tokens -= ticket.tokens

    def _level(self, name: Level) -> _Class:
        level = self._levels.get(name)
        if level is None:
            if len(self._levels) >= _MOST_LEVELS:
                self._levels = {known: old for known, old in self._levels.items() if old.flows}
            level = self._levels[name] = _Class()
            self._order = sorted(self._levels)
        return level
