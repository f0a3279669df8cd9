"""An HTTP/1.1 client: a pool of keep-alive connections to one server, each with one response at a time.

Responses are parsed by httptools, in C. A subclass of `HttpResponse` gets each piece of the body as it arrives: the
gateway's subclass passes it on, `CollectedResponse` keeps it with its arrival time.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import ssl
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast

import httptools

from powerband.http_client.problems import connection_problem
from powerband.web.authority import split_authority

MAX_HEAD_BYTES = 64 << 10  # of headers; also of trailers and chunk framing, beyond the size of the body
MAX_TURN_BYTES = 16 << 10  # processed per turn of the event loop; a body in tiny chunks takes 0.1 µs per byte


def request_head(method: str, target: str, host: str, length: int, headers: Mapping[str, str]) -> bytes:
    """target: the path and query. length: of the body. headers: added to the default ones, or replacing them."""
    lines = {"Host": host, "Content-Type": "application/json", "Content-Length": str(length), **headers}
    text = "".join([f"{name}: {value}\r\n" for name, value in lines.items()])
    return f"{method} {target} HTTP/1.1\r\n{text}\r\n".encode()


class HttpResponse:
    """A response being received. A subclass handles the body (`on_body`) and the end (`on_end`).

    Informational responses (1xx) and trailers are skipped.
    """

    __slots__ = (
        "_bytes_left",
        "_connection",
        "_ends_with_connection",
        "_parser",
        "bare_bytes",
        "code",
        "headers",
        "is_over",
        "max_bytes",
        "problem",
        "received_s",
        "status",
    )

    def __init__(self, max_bytes: float = math.inf) -> None:
        """max_bytes: of everything, headers and framing included."""
        self.max_bytes = self._bytes_left = max_bytes
        self.status = 0  # 0: its headers are not complete
        self.headers: list[tuple[bytes, bytes]] = []  # names in lower case
        self.received_s = 0.0  # when the latest bytes arrived, on time.monotonic(); 0: none have
        self.bare_bytes = 0  # bytes of headers and framing, minus bytes of the body
        self.is_over = False  # complete or failed
        self.code = ""  # why it failed: 'reset', 'garbage', 'too_large', or as `fail` was called
        self.problem = ""  # the same in words
        self._connection: OutboundConnection | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._ends_with_connection = True  # neither a length nor chunks: the body ends where the connection does

    def fail(self, code: str, problem: str) -> None:
        """The response has failed; closes the connection."""
        if not self.is_over:
            self.is_over, self.code, self.problem = True, code, problem
            self._leave()
            self.on_end()

    def close(self) -> None:
        """Stop receiving. Closes the connection unless the response is complete, so that the server notices."""
        self._leave()

    def _leave(self) -> None:
        connection, self._connection, self._parser = self._connection, None, None
        if connection is not None:
            connection.leave(self)

    # For subclasses.

    def on_body(self, body: bytes) -> None:
        """A piece of the body arrived. Must subtract twice its length from `bare_bytes`."""
        raise NotImplementedError

    def on_end(self) -> None:
        """Called once, when the response is complete or has failed."""

    # Called by the connection.

    def begin(self, connection: OutboundConnection) -> None:
        self._connection = connection
        self._parser = httptools.HttpResponseParser(self)

    def receive(self, data: bytes) -> None:
        connection, parser = self._connection, self._parser
        if connection is None or parser is None:
            return
        self.received_s = time.monotonic()
        size, bare_bytes = len(data), self.bare_bytes
        self.bare_bytes = bare_bytes + size if bare_bytes > 0 else size  # earlier large chunks earn no credit
        self._bytes_left -= size
        if self._bytes_left < 0:
            self.fail("too_large", f"the response is larger than {self.max_bytes} bytes")
            return
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.fail("garbage", "the server changes the protocol")
        except httptools.HttpParserError as problem:
            self.fail("garbage", f"the response is not HTTP: {problem}")
            connection.abort()  # even if the garbage follows a complete response
        if self.bare_bytes > MAX_HEAD_BYTES:
            self.fail("garbage", f"the server sent {self.bare_bytes} bytes of headers and framing")

    def on_connection_lost(self, problem: Exception | None) -> None:
        if problem is None and self.status and self._ends_with_connection:
            self._complete()
        else:
            why = (
                f"the connection broke: {connection_problem(problem)}"
                if problem
                else "the server closed the connection"
            )
            self.fail("reset", why)

    # Called by the parser.

    def on_message_begin(self) -> None:
        if self.is_over:
            raise ValueError("a response that no request asked for")  # the parser stops, and the connection is closed

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.status:
            return  # a trailer
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self._ends_with_connection = False
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._parser is None:
            return
        status = self._parser.get_status_code()
        if status >= 200:
            self.status = status
        else:
            self.headers.clear()

    def on_message_complete(self) -> None:
        connection, parser = self._connection, self._parser
        if connection is None or parser is None or not self.status:
            return  # an informational response: the real one is still to come
        connection.finish(is_reusable=parser.should_keep_alive() and not self._ends_with_connection)
        self._complete()

    def _complete(self) -> None:
        self.is_over = True
        self._connection = self._parser = None
        self.on_end()


class CollectedResponse(HttpResponse):
    """The whole body, in pieces as they arrived. `done` is set when the response is complete or has failed."""

    __slots__ = ("done", "pieces", "times_s")

    def __init__(self, max_bytes: float = math.inf) -> None:
        super().__init__(max_bytes)
        self.pieces: list[bytes] = []
        self.times_s: list[float] = []  # of each piece, on time.monotonic()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def body(self) -> bytes:
        return b"".join(self.pieces)

    def on_body(self, body: bytes) -> None:
        self.bare_bytes -= 2 * len(body)
        self.times_s.append(self.received_s)
        self.pieces.append(body)

    def on_end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


class OutboundConnection(asyncio.Protocol):
    """Carries one response at a time. pool: gets the connection back after each response that leaves it usable."""

    def __init__(self, pool: ConnectionPool | None = None) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._response: HttpResponse | None = None
        self._is_paused = False
        self._input = bytearray()  # the part of a large read that the response has not processed yet
        self.is_open = False
        self.idle_since_s = 0.0

    def send(self, request: Sequence[bytes], response: HttpResponse) -> None:
        """Send a request, given in pieces, and start receiving `response`, which fails if the connection is closed."""
        self._response = response
        response.begin(self)
        if self._transport is None or not self.is_open:
            response.fail("reset", "the connection was closed")
            return
        self._transport.writelines(request)

    async def exchange(self, request: Sequence[bytes], response: CollectedResponse) -> None:
        """Send a request and wait for the end of its response."""
        self.send(request, response)
        try:
            await response.done
        except asyncio.CancelledError:
            response.close()
            raise

    def pause(self) -> None:
        """Stop reading from the socket."""
        if not self._is_paused and self._transport is not None and not self._transport.is_closing():
            self._is_paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._is_paused and self._transport is not None and not self._transport.is_closing():
            self._is_paused = False
            if self._input:
                asyncio.get_running_loop().call_soon(self._receive_turn)
            else:
                self._transport.resume_reading()

    def abort(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    # Called by its response.

    def leave(self, response: HttpResponse) -> None:
        """The response has been abandoned."""
        if self._response is response:
            self._response = None
            self.abort()

    def finish(self, *, is_reusable: bool) -> None:
        """The response is complete."""
        self._response = None
        if not is_reusable or self._pool is None:
            self.abort()
            return
        self.resume_reading()
        self.idle_since_s = time.monotonic()
        self._pool.put_back(self)

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        if self._response is None:
            self.abort()  # no request asked for this
        elif len(data) <= MAX_TURN_BYTES and not self._input:
            self._response.receive(data)
        elif self._transport is not None:
            is_first = not self._input
            self._input += data
            self._transport.pause_reading()
            if is_first:
                self._receive_turn()

    def _receive_turn(self) -> None:
        """Process a part of a large read. The rest follows in later turns, before more is read from the socket."""
        response, transport = self._response, self._transport
        if response is None or transport is None or self._is_paused or not self._input:
            return
        data = bytes(self._input[:MAX_TURN_BYTES])
        del self._input[:MAX_TURN_BYTES]
        response.receive(data)
        if self._input and self._response is None:
            self.abort()  # no request asked for the rest
        elif self._is_paused or transport.is_closing():
            pass
        elif self._input:
            asyncio.get_running_loop().call_soon(self._receive_turn)
        else:
            transport.resume_reading()

    def connection_lost(self, problem: Exception | None) -> None:
        self.is_open = False
        if self._pool is not None:
            self._pool.remove(self)
        while self._input and self._response is not None:  # data received before is still processed
            data = bytes(self._input[:MAX_TURN_BYTES])
            del self._input[:MAX_TURN_BYTES]
            self._response.receive(data)
        response, self._response = self._response, None
        if response is not None:
            response.on_connection_lost(problem)


class ConnectionPool:
    """Connections to one server. Reuses the most recently used idle one, else opens a new one."""

    def __init__(self, base: str, *, insecure: bool = False, max_idle: float = math.inf) -> None:
        """base: 'http://host:port', with an optional path prefix. insecure: certificates are not verified.

        Raises UsageError for an invalid address.
        """
        scheme, _, rest = base.partition("://")
        self.authority, _, prefix = rest.partition("/")
        self.prefix = f"/{prefix.strip('/')}" if prefix.strip("/") else ""
        self._host, self._port = split_authority(self.authority, 443 if scheme == "https" else 80)
        self._tls = tls_context(insecure) if scheme == "https" else None
        self._max_idle = max_idle
        self._idle: list[OutboundConnection] = []
        self._is_closed = False

    async def take(self, connect_s: float | None = None) -> tuple[OutboundConnection, bool]:
        """A connection, and whether it was used before. connect_s: timeout for opening a new one.

        Raises OSError, including TimeoutError after `connect_s`.
        """
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection, True
        name = self._host if self._tls is not None else None
        async with asyncio.timeout(connect_s):
            _, connection = await asyncio.get_running_loop().create_connection(
                partial(OutboundConnection, self), self._host, self._port, ssl=self._tls, server_hostname=name
            )
        return connection, False

    def put_back(self, connection: OutboundConnection) -> None:
        if connection.is_open and not self._is_closed and len(self._idle) < self._max_idle:
            self._idle.append(connection)
        else:
            connection.abort()

    def remove(self, connection: OutboundConnection) -> None:
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)

    def drop_idle(self, before_s: float = math.inf) -> None:
        """Close connections that have been idle since before `before_s`, oldest first."""
        while self._idle and self._idle[0].idle_since_s < before_s:
            self._idle.pop(0).abort()

    def close(self) -> None:
        """Close idle connections now, and those in use after their response."""
        self._is_closed = True
        self.drop_idle()


def tls_context(insecure: bool) -> ssl.SSLContext:
    """insecure: certificates are not verified."""
    context = ssl.create_default_context()
    if insecure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
