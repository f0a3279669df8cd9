"""One connection to a replica, and one exchange after the other on it: HTTP/1.1, parsed by httptools, in C.

What came and was not read yet is bounded: the socket is not read while a reader is that far behind.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol, cast

import httptools

MAX_UNREAD_BYTES = 64 << 10
MAX_HEAD_BYTES = 64 << 10  # of a head; and of whatever else is no body: trailers, what chunks say beside their length


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


class SocketObserver(Protocol):
    """Hears what the socket of an exchange does."""

    def received(self) -> None:
        """Bytes of any kind came."""

    def paused(self) -> None:
        """It is not read for now: the reader is behind."""

    def resumed(self) -> None: ...


class UpstreamExchange:
    """A request that was sent, and its answer as it comes. `close` at any time; the end of it must be reached, or that.

    due_s: by when more has to come, on time.monotonic(), while somebody waits for it; else 0.
    """

    __slots__ = (
        "_connection",
        "_consumer",
        "_is_held",
        "_limit_before_s",
        "_limit_s",
        "_pieces",
        "_problem",
        "_unread",
        "_waiter",
        "between_s",
        "due_s",
        "end_s",
        "has_bytes",
        "headers",
        "is_let_end",
        "is_over",
        "observer",
        "status",
    )

    def __init__(self, connection: UpstreamConnection, first_s: float, between_s: float, end_s: float) -> None:
        """first_s: by when the first of the body has to come. between_s: at most until the next. end_s: for all."""
        self._connection: UpstreamConnection | None = connection
        self._pieces: list[bytes] = []
        self._unread = 0
        self.is_over = False
        self.is_let_end = False
        self._problem: UpstreamFailure | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._consumer: Callable[[bytes], bool] | None = None
        self._is_held = False
        self._limit_s = self._limit_before_s = min(first_s, end_s)
        self.between_s, self.end_s = between_s, end_s
        self.due_s = 0.0
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.observer: SocketObserver | None = None
        self.has_bytes = False  # of the answer, of any kind

    async def read_head(self) -> None:
        """Wait until `status` and `headers` are there. Raises UpstreamFailure."""
        while not self.status:
            if self._problem is not None:
                raise self._problem
            await self._wait()

    async def read(self) -> bytes:
        """All that came of the body since the last time, at least a byte; b'' at its end. Raises UpstreamFailure."""
        while True:
            if self._pieces:
                return self._take()
            if self._problem is not None:
                raise self._problem
            if self.is_over:
                return b""
            await self._wait()

    async def stream_to(self, take: Callable[[bytes], bool]) -> None:
        """Hand on what comes as it comes, without waking anybody, until `take` returns False, or to the body's end.

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
        """Hand on nothing until `release`; what comes meanwhile is bounded."""
        self._is_held = True
        self.due_s = 0.0
        if self._connection is not None:
            self._connection.pause()

    def release(self) -> None:
        self._is_held = False
        self._extend()
        if self._connection is not None:
            self._connection.resume_reading()
        self.flush()

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
        connection, self._connection = self._connection, None
        self._pieces.clear()
        if connection is not None:
            connection.leave(self)

    def drain(self, due_s: float) -> bool:
        """Read no more, but leave the connection to what is left of the answer until `due_s`. True: nothing is."""
        if not self.is_over:
            self.is_let_end = True
            self.due_s = due_s
        return self.is_over

    def fail(self, code: str, message: str) -> None:
        """It will not be whole. What came before can still be read."""
        if self.is_over:
            return
        self._problem = UpstreamFailure(code, message)
        self.is_over = True
        connection, self._connection = self._connection, None
        self.flush()
        if connection is not None:
            connection.leave(self)

    # Called by the connection.

    def on_data(self, body: bytes) -> None:
        if not self.is_let_end:
            self._pieces.append(body)
            self._unread += len(body)

    def on_end(self) -> None:
        self.is_over = True
        self._connection = None

    def flush(self) -> None:
        """Hand on what came, or wake who reads."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        if self._consumer is None:
            waiter.set_result(None)
            return
        if self._is_held:
            return
        try:
            wants_more = not self._pieces or self._consumer(self._take())
        except Exception as problem:
            waiter.set_exception(problem)
            return
        if not wants_more:
            waiter.set_result(None)
        elif self._is_held:
            pass
        elif self._problem is not None:
            waiter.set_exception(self._problem)
        elif self.is_over:
            waiter.set_result(None)
        else:
            self.due_s = self._limit_s

    @property
    def is_behind(self) -> bool:
        return self._is_held or self._unread >= MAX_UNREAD_BYTES

    def _take(self) -> bytes:
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        if self._unread >= MAX_UNREAD_BYTES and self._connection is not None:
            self._connection.resume_reading()
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


class UpstreamConnection(asyncio.Protocol):
    """Carries one exchange at a time. `idle_since_s`: when it became free."""

    def __init__(self, owner: ConnectionOwner) -> None:
        self._owner = owner
        self._transport: asyncio.Transport | None = None
        self._exchange: UpstreamExchange | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._bare_bytes = 0  # that came since the last of a body, without any of it
        self._has_body = False  # in what is being read now
        self._ends_by_closing = True  # the answer tells no length
        self._is_paused = False
        self.is_open = False
        self.idle_since_s = 0.0

    def begin(self, exchange: UpstreamExchange, request: list[bytes]) -> None:
        self._exchange = exchange
        self._parser = httptools.HttpResponseParser(self)
        self._bare_bytes, self._ends_by_closing = 0, True
        if self._transport is None or not self.is_open:
            exchange.fail("reset", "The connection was closed.")
            return
        self._transport.writelines(request)

    def resume_reading(self) -> None:
        if self._is_paused and self._transport is not None and not self._transport.is_closing():
            self._is_paused = False
            self._transport.resume_reading()
            if self._exchange is not None and self._exchange.observer is not None:
                self._exchange.observer.resumed()

    def pause(self) -> None:
        if not self._is_paused and self._transport is not None and not self._transport.is_closing():
            self._is_paused = True
            self._transport.pause_reading()
            if self._exchange is not None and self._exchange.observer is not None:
                self._exchange.observer.paused()

    def leave(self, exchange: UpstreamExchange) -> None:
        if self._exchange is exchange:
            self._exchange = None
            self.abort()

    def abort(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        exchange, parser = self._exchange, self._parser
        if exchange is None or parser is None:
            self.abort()  # nobody asked
            return
        exchange.has_bytes, self._has_body = True, False
        if exchange.observer is not None:
            exchange.observer.received()
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            exchange.fail("garbage", "The replica changes the protocol.")
        except httptools.HttpParserError as problem:
            exchange.fail("garbage", f"The replica's answer is no HTTP: {problem}.")
            self.abort()  # also when it came after an answer that is whole
        self._bare_bytes = 0 if self._has_body else self._bare_bytes + len(data)
        if self._bare_bytes > MAX_HEAD_BYTES:
            exchange.fail("garbage", f"The replica sent {self._bare_bytes} bytes of headers.")
        exchange.flush()
        if exchange.is_behind and self._exchange is exchange:
            self.pause()

    def connection_lost(self, problem: Exception | None) -> None:
        self.is_open = False
        exchange = self._exchange
        self._owner.lost(self)
        if exchange is None:
            return
        if problem is None and exchange.status and self._ends_by_closing:
            self._exchange = None
            exchange.on_end()
            exchange.flush()
        else:
            exchange.fail("reset", f"The connection broke: {problem}." if problem else "The replica closed it.")

    # Called by the parser.

    def on_message_begin(self) -> None:
        if self._exchange is None:
            self.abort()  # an answer that nobody asked for, right behind the one before

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._exchange is None or self._exchange.status:
            return  # trailers: nobody reads them, and their number has no bound
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self._ends_by_closing = False
        self._exchange.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._exchange is None or self._parser is None:
            return
        status = self._parser.get_status_code()
        if status >= 200:
            self._exchange.status = status
        else:
            self._exchange.headers.clear()

    def on_body(self, body: bytes) -> None:
        exchange, self._has_body = self._exchange, True
        if exchange is not None:
            exchange.on_data(body)

    def on_message_complete(self) -> None:
        exchange, parser = self._exchange, self._parser
        if exchange is None or parser is None or not exchange.status:
            return  # 'continue': the answer is still to come
        self._exchange = None
        if self._transport is None or not parser.should_keep_alive() or self._ends_by_closing:
            self.abort()
        else:
            self.resume_reading()
            self.idle_since_s = time.monotonic()
        exchange.on_end()
        self._owner.free(self)


class ConnectionOwner(Protocol):
    """The owner of connections. It is called when a connection becomes free, and when it is lost."""

    def free(self, connection: UpstreamConnection) -> None: ...

    def lost(self, connection: UpstreamConnection) -> None: ...
