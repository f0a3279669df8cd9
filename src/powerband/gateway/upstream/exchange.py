"""A request to a replica and its response: read piece by piece or passed to a consumer, with a timeout for each phase.

Unread data is bounded: reading from the socket pauses while the reader is too far behind.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from powerband.gateway.upstream.failure import UpstreamFailure
from powerband.http_client.connection import HttpResponse

MAX_UNREAD_BYTES = 64 << 10


class SocketObserver(Protocol):
    """Notified of the activity of an exchange's socket."""

    def received(self) -> None:
        """Bytes arrived, of any kind."""

    def paused(self) -> None:
        """Reading is paused, because the reader is behind."""

    def resumed(self) -> None: ...


class UpstreamExchange(HttpResponse):
    """A request that was sent, and its response. Read it to the end, or call `close`, which is allowed at any time.

    due_s: while a reader waits, the time on time.monotonic() by which more data must arrive; else 0.
    """

    __slots__ = (
        "_consumer",
        "_is_held",
        "_is_paused",
        "_limit_before_s",
        "_limit_s",
        "_pieces",
        "_unread",
        "_waiter",
        "due_s",
        "end_s",
        "idle_s",
        "is_draining",
        "observer",
    )

    def __init__(self, first_s: float, idle_s: float, end_s: float) -> None:
        """first_s, end_s: when the body must have begun and ended. between_s: maximum time between two reads."""
        super().__init__()
        self._pieces: list[bytes] = []
        self._unread = 0
        self.is_draining = False
        self._waiter: asyncio.Future[None] | None = None
        self._consumer: Callable[[bytes], bool] | None = None
        self._is_held = False
        self._is_paused = False
        self.observer: SocketObserver | None = None
        self._limit_s = self._limit_before_s = min(first_s, end_s)
        self.idle_s, self.end_s = idle_s, end_s
        self.due_s = 0.0

    def _failure(self) -> UpstreamFailure:
        return UpstreamFailure(self.code, f"{self.problem[:1].upper()}{self.problem[1:]}.")

    async def read_head(self) -> None:
        """Wait for `status` and `headers`. Raises UpstreamFailure."""
        while not self.status:
            if self.code:
                raise self._failure()
            await self._wait()

    async def read(self) -> bytes:
        """The body received since the last call, at least one byte; b'' at its end. Raises UpstreamFailure."""
        while True:
            if self._pieces:
                return self._take()
            if self.code:
                raise self._failure()
            if self.is_over:
                return b""
            await self._wait()

    async def stream_to(self, take: Callable[[bytes], bool]) -> None:
        """Pass on data as it arrives, without waking a task, until `take` returns False or the body ends.

        Raises UpstreamFailure, and what `take` raises. It may call `hold`.
        """
        self._consumer = take
        self._extend()
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            self.flush()
            await self._waiter
        finally:
            self._consumer = self._waiter = None
            self.due_s = 0.0

    def no_progress(self) -> None:
        """The data read last was no progress: restore the previous time limit."""
        self._limit_s = self._limit_before_s

    def _extend(self) -> None:
        self._limit_before_s, self._limit_s = self._limit_s, min(time.monotonic() + self.idle_s, self.end_s)

    def hold(self) -> None:
        """Pass on nothing until `release` or the end of the body. Data buffered meanwhile is bounded."""
        self._is_held = True
        self.due_s = self.end_s
        self._pause()

    def release(self) -> None:
        self._is_held = False
        self._extend()
        self._resume()
        self.flush()

    def _pause(self) -> None:
        if self._connection is not None and not self._is_paused:
            self._is_paused = True
            self._connection.pause()
            if self.observer is not None:
                self.observer.paused()

    def _resume(self) -> None:
        if self._connection is not None and self._is_paused:
            self._is_paused = False
            self._connection.resume_reading()
            if self.observer is not None:
                self.observer.resumed()

    async def read_all(self, max_bytes: int) -> bytes:
        """The whole body. Raises UpstreamFailure, also if it is larger than `max_bytes`."""
        pieces, size = [], 0
        while piece := await self.read():
            pieces.append(piece)
            size += len(piece)
            if size > max_bytes:
                self.close()
                raise UpstreamFailure("too_large", f"The replica's response is larger than {max_bytes} bytes.")
        return b"".join(pieces)

    def close(self) -> None:
        """Stop receiving. Closes the connection unless the response is complete, so that the replica aborts it."""
        self._pieces.clear()
        super().close()

    def drain(self, due_s: float) -> bool:
        """Discard the rest of the response until `due_s`, to keep the connection. True: it is already complete."""
        if not self.is_over:
            self.is_draining = True
            self.due_s = due_s
        return self.is_over

    # Called by the connection, and by the parser.

    def receive(self, data: bytes) -> None:
        if self.observer is not None:
            self.observer.received()
        HttpResponse.receive(self, data)  # faster than super(): it runs for every chunk
        self.flush()
        if self._is_held or self._unread >= MAX_UNREAD_BYTES:
            self._pause()

    def on_body(self, body: bytes) -> None:
        size = len(body)
        self.bare_bytes -= size + size
        if not self.is_draining:
            self._pieces.append(body)
            self._unread += size

    def on_end(self) -> None:
        self.flush()

    def flush(self) -> None:
        """Pass buffered data to the consumer, or wake the reader."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        if self._consumer is None:
            waiter.set_result(None)
            return
        if self._is_held and not self.is_over:  # at the end, the little that is left is passed on
            return
        try:
            wants_more = not self._pieces or self._consumer(self._take())
        except Exception as problem:
            waiter.set_exception(problem)
            return
        if not wants_more:
            waiter.set_result(None)
        elif self.code:
            waiter.set_exception(self._failure())
        elif self.is_over:
            waiter.set_result(None)
        elif not self._is_held:
            self.due_s = self._limit_s

    def _take(self) -> bytes:
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        if self._unread >= MAX_UNREAD_BYTES:
            self._resume()
        self._unread = 0
        self._extend()
        return data

    async def _wait(self) -> None:
        self.due_s = self._limit_s
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
            self.due_s = 0.0
