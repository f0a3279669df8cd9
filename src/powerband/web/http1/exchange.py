"""One request and its response: the interface between a connection and an ASGI application."""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Scope

from powerband.web.client_connection import ClientConnection
from powerband.web.errors import HttpError
from powerband.web.http1.head import RequestHead

logger = logging.getLogger(__name__)

MAX_UNREAD_BYTES = 64 << 10
_PHRASES = {status.value: status.phrase for status in HTTPStatus}


def status_line(status: int) -> bytes:
    """The status line. An unregistered status, such as 499, has no phrase."""
    return f"HTTP/1.1 {status} {_PHRASES.get(status, '')}\r\n".encode()


class ConnectionControl(Protocol):
    """What an exchange needs of its connection."""

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]: ...

    def write(self, data: bytes) -> None: ...

    async def writable(self) -> None:
        """Wait until the write buffer has drained, or the client has disconnected."""

    def wants_body(self) -> None:
        """The application waits for more of the body."""

    def answered(self, exchange: HttpExchange) -> None:
        """The response is complete."""

    def refuse(self, error: HttpError) -> None:
        """Answer with this error unless a response has begun, and close the connection."""

    def break_off(self) -> None:
        """Close the connection in the middle of a response."""


class HttpExchange:
    """Runs the application for one request. is_lost: the client has disconnected."""

    __slots__ = (
        "_body",
        "_connection",
        "_has_body",
        "_head",
        "_left",
        "_line",
        "_news",
        "_scope",
        "_unsent",
        "awaits_continue",
        "has_started",
        "has_whole_body",
        "is_answered",
        "is_lost",
        "keeps_connection",
    )

    def __init__(self, connection: ConnectionControl, head: RequestHead, scope: Scope, line: ClientConnection) -> None:
        self._connection = connection
        self._head = head
        self._scope = scope
        self._line = line
        self._body = bytearray()
        self._news = asyncio.Event()  # more of the body, or the end of the exchange
        self._unsent = b""  # a response head, sent together with the first part of the body
        self._has_body = True
        self._left: int | None = None  # bytes of the response body still to come; None: no Content-Length
        self.awaits_continue = head.awaits_continue
        self.has_whole_body = False
        self.has_started = False
        self.is_answered = False
        self.is_lost = False
        self.keeps_connection = head.keeps_connection

    @property
    def is_behind(self) -> bool:
        """Whether the application is too far behind in reading the body, so that reading from the socket must pause.

        Reading never pauses for a complete body: the socket must be read to notice when the client disconnects.
        """
        return len(self._body) >= MAX_UNREAD_BYTES and not (self.has_whole_body or self.is_answered)

    # Called by the connection.

    def feed(self, content: bytes, *, is_last: bool) -> None:
        if not self.is_answered:
            self._body += content
        self.has_whole_body = is_last
        self._news.set()

    def lose(self) -> None:
        self.is_lost = True
        self._body.clear()
        self._news.set()

    def refuse(self, error: HttpError) -> None:
        self._connection.refuse(error)

    async def run(self, app: ASGIApp) -> None:
        try:
            await app(self._scope, self.receive, self.send)
        except Exception as error:
            if not self.is_lost:
                logger.error("The application failed; its response is incomplete.", exc_info=error)
        finally:
            if not (self.is_answered or self.is_lost):
                if self.has_started:
                    self._connection.break_off()
                else:
                    self._connection.refuse(
                        HttpError(500, "internal_error", "The server failed with an unexpected error.")
                    )

    # ASGI.

    async def receive(self) -> Message:
        if self.awaits_continue and not self.has_started and not self.is_lost:
            self.awaits_continue = False
            self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not (self.is_lost or self.is_answered):
            self._connection.wants_body()
            await self._news.wait()
            self._news.clear()
        if self.is_lost or self.is_answered:
            return {"type": "http.disconnect"}
        body = bytes(self._body)
        self._body.clear()
        return {"type": "http.request", "body": body, "more_body": not self.has_whole_body}

    async def send(self, message: Message) -> None:
        await self._connection.writable()
        if self.is_lost:
            return
        if not self.has_started:
            self._send_head(message["status"], message.get("headers", ()))
        elif not self.is_answered:
            self._send_body(message.get("body", b""), is_last=not message.get("more_body", False))
        else:
            raise RuntimeError("An answer goes on after its end.")

    def _send_head(self, status: int, headers: Any) -> None:
        length: int | None = None
        lines = [status_line(status)]
        for name, value in (*self._connection.default_headers, *headers):
            if b"\n" in value or b"\r" in value:
                raise RuntimeError(f"A header's value has a line end: {value[:80]!r}.")
            if name == b"connection":
                self.keeps_connection = self.keeps_connection and value.lower() != b"close"
                continue
            if name == b"content-length":
                length = int(value)
            lines.append(b"%b: %b\r\n" % (name, value))
        self._has_body = self._head.method != "HEAD" and status not in (204, 304)
        self._left = length if self._has_body else 0
        self._line.is_chunked = self._left is None and self._head.http_version == "1.1"
        if self._line.is_chunked:
            lines.append(b"transfer-encoding: chunked\r\n")
        if self.awaits_continue or (self._left is None and not self._line.is_chunked):
            # After an unanswered Expect, the client may still send the body or not (RFC 9110, 10.1.1). A response with
            # neither length nor chunks ends when the connection closes.
            self.keeps_connection = False
        if not self.keeps_connection:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        self.has_started = True  # not earlier: if the head is invalid, a 500 can still be sent
        if self._left:
            self._unsent = b"".join(lines)
        else:
            self._connection.write(b"".join(lines))

    def _send_body(self, body: bytes, *, is_last: bool) -> None:
        if not self._has_body:
            body = b""
        elif self._left is not None:
            self._left -= len(body)
            if self._left < 0 or (is_last and self._left):
                raise RuntimeError("An answer is not as long as its Content-Length.")
        elif self._line.is_chunked:
            body = (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + (b"0\r\n\r\n" if is_last else b"")
        if body := self._unsent + body:
            self._unsent = b""
            self._connection.write(body)
        if is_last:
            self.is_answered = True
            self._body.clear()
            self._news.set()
            self._connection.answered(self)
