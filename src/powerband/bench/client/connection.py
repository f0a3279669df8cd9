"""HTTP/1.1 as a load generator needs it: bytes out, and every piece of the answer with the time at which it came.

Nothing is parsed while an answer streams but HTTP itself (by httptools, in C): what arrives is noted, and read
afterwards, so that reading one answer does not delay the clock of another.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from typing import cast

import httptools

from powerband.bench.client.messages import ServerAddress
from powerband.web.authority import split_authority

MAX_ANSWER_BYTES = 64 << 20


class HTTPResponse:
    """pieces: of the body, each with the monotonic time of its arrival. problem: why it is not whole, or ''."""

    __slots__ = ("finished", "pieces", "problem", "size", "status", "times")

    def __init__(self) -> None:
        self.status = 0
        self.times: list[float] = []
        self.pieces: list[bytes] = []
        self.size = 0
        self.problem = ""
        self.finished = False

    def body(self) -> bytes:
        return b"".join(self.pieces)


class BenchConnection(asyncio.Protocol):
    """One connection, which carries one exchange at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self.answer: HTTPResponse | None = None
        self.is_reusable = True
        self._done: asyncio.Future[None] | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._ends_by_closing = True  # the answer tells no length

    def exchange(self, request: bytes) -> tuple[HTTPResponse, asyncio.Future[None]]:
        """Send `request`. The future is done when the answer is whole, or when `problem` says why it will not be."""
        if self._transport is None:
            raise ConnectionError("not connected")
        self.answer, self._done = HTTPResponse(), asyncio.get_running_loop().create_future()
        self._parser, self._ends_by_closing = httptools.HttpResponseParser(self), True
        self._transport.write(request)
        return self.answer, self._done

    def close(self) -> None:
        self.is_reusable = False
        if self._transport is not None:
            self._transport.abort()

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            return self.close()  # nobody asked
        self._now_s = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._end("the server changes the protocol")
        except httptools.HttpParserError as problem:
            self._end(f"not HTTP: {problem}")

    def connection_lost(self, problem: Exception | None) -> None:
        self.is_reusable = False
        if problem is None and self.answer is not None and self.answer.pieces and self._ends_by_closing:
            return self.on_message_complete()
        return self._end(f"the connection broke: {problem}" if problem else "the server closed the connection")

    # Called by the parser.

    def on_header(self, name: bytes, _value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._ends_by_closing = False

    def on_headers_complete(self) -> None:
        if self.answer is not None and self._parser is not None:
            self.answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        answer = self.answer
        if answer is None:
            return
        answer.times.append(self._now_s)
        answer.pieces.append(body)
        answer.size += len(body)
        if answer.size > MAX_ANSWER_BYTES:
            self._end(f"an answer of more than {MAX_ANSWER_BYTES >> 20} MiB")

    def on_message_complete(self) -> None:
        if self.answer is not None and self.answer.status < 200:
            return  # 'continue': the answer is still to come
        if self._parser is not None and not self._parser.should_keep_alive():
            self.is_reusable = False
        if self.answer is not None:
            self.answer.finished = True
        self._end("")

    def _end(self, problem: str) -> None:
        done, self._done = self._done, None
        if done is None or self.answer is None:
            return
        self.answer.problem = problem
        self.answer, self._parser = None, None
        if problem:
            self.close()
        if not done.done():
            done.set_result(None)


class ConnectionPool:
    """Connections to one server: the one that was used last is used next, and a new one is made when none is idle."""

    def __init__(self, target: ServerAddress) -> None:
        scheme, _, rest = target.base.partition("://")
        authority, _, _ = rest.partition("/")
        host, port = split_authority(authority, 443 if scheme == "https" else 80)
        self._where = host, port
        self._tls = tls_context(target.insecure) if scheme == "https" else None
        self._idle: list[BenchConnection] = []

    async def take(self) -> tuple[BenchConnection, bool]:
        """A connection, and whether it was used before. Raises OSError."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable:
                return connection, True
        host, port = self._where
        server_hostname = host if self._tls is not None else None
        _, connection = await asyncio.get_running_loop().create_connection(
            BenchConnection, host, port, ssl=self._tls, server_hostname=server_hostname
        )
        return connection, False

    def put_back(self, connection: BenchConnection) -> None:
        if connection.is_reusable:
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()


def tls_context(insecure: bool) -> ssl.SSLContext:
    """insecure: certificates are not checked."""
    context = ssl.create_default_context()
    if insecure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
