"""Fair turns: what takes long for the event loop is done in small steps, for one client after the other.

Without a bound, a burst of 900 requests, or their 900 responses, would be one turn of several hundred milliseconds, in
which no other request is served. Steps beyond the bound wait, and tenants that wait are served in rotation:

    a a a a a a … (900)  ─┐
    b                    ─┴─► a b a a a a a a │ a a a a a a a a │ a …     8 in each turn of the event loop

A large body takes up to 70 ms to decode, so that goes on in a thread, one body at a time. The thread holds the
interpreter's lock for one call of the decoder at a time, some 10 ms, between which the event loop runs.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
LARGE_BYTES = 64 << 10  # smaller bodies take less than a millisecond, as long as going through a thread


class Rotation:
    """Those that wait, by tenant: one of each tenant is next, in rotation."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def join(self, tenant: str) -> asyncio.Future[None]:
        """Becomes done when it is this one's turn."""
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(ready)
        return ready

    def call_next(self) -> bool:
        """Call the next one. False: none waits whose client has not left."""
        while self._waiting:
            tenant = next(iter(self._waiting))
            queue = self._waiting.pop(tenant)
            ready = queue.popleft()
            if queue:
                self._waiting[tenant] = queue  # at the end
            if not ready.done():
                ready.set_result(None)
                return True
        return False


class FairTurns:
    """`await turn(tenant)` before each step that takes longer than some 100 µs."""

    def __init__(self, num_per_turn: int) -> None:
        """num_per_turn: steps in one turn of the event loop."""
        self._num_per_turn = num_per_turn
        self._num_taken = 0  # in this turn
        self._waiting = Rotation()
        self._is_scheduled = False

    async def turn(self, tenant: str) -> None:
        """Wait until a step of this tenant may run; returns at once unless others use up this turn."""
        if not self._waiting and self._num_taken < self._num_per_turn:
            self._num_taken += 1
            self._schedule()
            return
        await self._waiting.join(tenant)

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._is_scheduled = False
        self._num_taken = 0
        while self._num_taken < self._num_per_turn and self._waiting.call_next():
            self._num_taken += 1
        if self._num_taken:
            self._schedule()


class Decoding:
    """Decodes bodies: small ones a few in each turn of the event loop, large ones in a thread, one after the other."""

    def __init__(self, turns: FairTurns) -> None:
        self._turns = turns
        self._waiting = Rotation()
        self._is_busy = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="body")

    async def decode(self, tenant: str, data: bytes, decode: Callable[[bytes], T]) -> T:
        """What `decode` makes of the data. Raises what it raises."""
        if len(data) <= LARGE_BYTES:
            await self._turns.turn(tenant)
            return decode(data)
        await self._begin(tenant)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, decode, data)
        finally:
            self._is_busy = self._waiting.call_next()

    async def _begin(self, tenant: str) -> None:
        if not self._is_busy:
            self._is_busy = True
            return
        ready = self._waiting.join(tenant)
        try:
            await ready
        except asyncio.CancelledError:
            if ready.done() and not ready.cancelled():  # its client left when its turn had come
                self._is_busy = self._waiting.call_next()
            raise

    def close(self) -> None:
        self._thread.shutdown(wait=False)
