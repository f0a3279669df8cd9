"""Fair turns: a bounded number of steps in one turn of the event loop, however many requests a tenant sends.

Without a bound, a burst of 900 requests, or their 900 responses, would be one turn of several hundred milliseconds, in
which no other request is served. Steps beyond the bound wait, and tenants that wait are served in rotation:

    a a a a a a … (900)  ─┐
    b                    ─┴─► a b a a a a a a │ a a a a a a a a │ a …     8 in each turn of the event loop
"""

from __future__ import annotations

import asyncio
from collections import deque


class FairTurns:
    """`await turn(tenant)` before each step that takes longer than some 100 µs."""

    def __init__(self, num_per_turn: int) -> None:
        """num_per_turn: steps in one turn of the event loop."""
        self._num_per_turn = num_per_turn
        self._num_taken = 0  # in this turn
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by tenant, in the order of their turns
        self._is_scheduled = False

    async def turn(self, tenant: str) -> None:
        """Wait until a step of this tenant may run; returns at once unless others use up this turn."""
        if not self._waiting and self._num_taken < self._num_per_turn:
            self._num_taken += 1
            self._schedule()
            return
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(ready)
        await ready

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._is_scheduled = False
        self._num_taken = 0
        while self._waiting and self._num_taken < self._num_per_turn:
            tenant = next(iter(self._waiting))
            queue = self._waiting.pop(tenant)
            ready = queue.popleft()
            if queue:
                self._waiting[tenant] = queue  # at the end
            if not ready.done():  # its client has not left
                ready.set_result(None)
                self._num_taken += 1
        if self._num_taken:
            self._schedule()
