"""A request to a replica, and its response as it comes: read piece by piece, or handed on, with a limit for each phase.

What came and was not read yet is bounded: the socket is not read while a reader is that far behind.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from powerband.http_client.connection import HttpResponse

MAX_UNREAD_BYTES = 64 << 10


class UpstreamFailure(ConnectionError):
    """A replica did not answer, or not to the end. `code`: what to call it in records and metrics.

    is_refusal: it is well, and has no room. is_absence: nothing listens there, or its engine is gone; the request has
    not reached an engine. retry_after_s: it wants to be left alone for so long. counts: against the replica, for the
    circuit breaker; else it only does not offer what was asked for. is_lasting: it would say so again.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        is_refusal: bool = False,
        is_absence: bool = False,
        retry_after_s: float | None = None,
        counts: bool = True,
        is_lasting: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.is_refusal = is_refusal
        self.is_absence = is_absence
        self.retry_after_s = retry_after_s
        self.counts = counts
        self.is_lasting = is_lasting

    @classmethod
    def invalid(cls, problem: Exception) -> UpstreamFailure:
        return cls("garbage", f"The replica's answer is not what was asked for: {problem}.")


class SocketObserver(Protocol):
    """Hears what the socket of an exchange does."""

    def received(self) -> None:
        """Bytes of any kind came."""

    def paused(self) -> None:
        """It is not read for now: the reader is behind."""

    def resumed(self) -> None: ...


class UpstreamExchange(HttpResponse):
    """A request that was sent, and its answer as it comes. `close` at any time; the end of it must be reached, or that.

    due_s: by when more has to come, on time.monotonic(), while a reader waits for it; else 0.
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
        "between_s",
        "due_s",
        "end_s",
        "is_let_end",
        "observer",
    )

    def __init__(self, first_s: float, between_s: float, end_s: float) -> None:
        """first_s: by when the first of the body has to come. between_s: at most until the next. end_s: for all."""
        super().__init__()
        self._pieces: list[bytes] = []
        self._unread = 0
        self.is_let_end = False
        self._waiter: asyncio.Future[None] | None = None
        self._consumer: Callable[[bytes], bool] | None = None
        self._is_held = False
        self._is_paused = False
        self.observer: SocketObserver | None = None
        self._limit_s = self._limit_before_s = min(first_s, end_s)
        self.between_s, self.end_s = between_s, end_s
        self.due_s = 0.0

    def _failure(self) -> UpstreamFailure:
        return UpstreamFailure(self.code, f"{self.problem[:1].upper()}{self.problem[1:]}.")

    async def read_head(self) -> None:
        """Wait until `status` and `headers` are there. Raises UpstreamFailure."""
        while not self.status:
            if self.code:
                raise self._failure()
            await self._wait()

    async def read(self) -> bytes:
        """All that came of the body since the last time, at least a byte; b'' at its end. Raises UpstreamFailure."""
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
        """What was read last does not count: the time by which more has to come stays what it was before."""
        self._limit_s = self._limit_before_s

    def _extend(self) -> None:
        self._limit_before_s, self._limit_s = self._limit_s, min(time.monotonic() + self.between_s, self.end_s)

    def hold(self) -> None:
        """Hand on nothing until `release`, or the end; what comes meanwhile is bounded."""
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
        """The whole body. Raises UpstreamFailure, also when it is larger."""
        pieces, size = [], 0
        while piece := await self.read():
            pieces.append(piece)
            size += len(piece)
            if size > max_bytes:
                self.close()
                raise UpstreamFailure(
                    "too_large", f"The replica's answer is larger than {max_bytes} bytes.", counts=False
                )
        return b"".join(pieces)

    def close(self) -> None:
        """Want no more of it. Ends the connection unless the answer is whole, so that the replica notices."""
        self._pieces.clear()
        super().close()

    def drain(self, due_s: float) -> bool:
        """Read no more, but leave the connection to what is left of the answer until `due_s`. True: nothing is."""
        if not self.is_over:
            self.is_let_end = True
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
        if not self.is_let_end:
            self._pieces.append(body)
            self._unread += size

    def on_end(self) -> None:
        self.flush()

    def flush(self) -> None:
        """Hand on what came, or wake who reads."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        if self._consumer is None:
            waiter.set_result(None)
            return
        if self._is_held and not self.is_over:  # at the end the rest is handed on, which is little
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
