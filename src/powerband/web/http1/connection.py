"""One client's connection: HTTP/1.1 with pipelining (RFC 9112), and a limit on everything that a client can send, leave
open or not read.

Pipelined requests are buffered as bytes: a head is parsed when the previous response is complete. The socket is still
read meanwhile, to notice when the client disconnects.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, cast

from starlette.types import ASGIApp
from uvicorn.server import ServerState

from powerband.web.body_budget import BodyBudget
from powerband.web.client_connection import ClientConnection, set_client_connection
from powerband.web.errors import HttpError, error_response
from powerband.web.http1.connection_limit import ConnectionLimit
from powerband.web.http1.exchange import HttpExchange, status_line
from powerband.web.http1.framing import Framing, framing_of
from powerband.web.http1.head import RequestHead, parse_head

MAX_HEAD_BYTES = 64 << 10
MAX_BLANK_LINES = 32  # before a request; the RFC asks servers to accept at least one
MAX_AHEAD_BYTES = 64 << 10  # of pipelined requests, plus what one read of the socket returns
SECONDS_FOR_HEAD = 30.0
SECONDS_IDLE = 75.0  # longer than most proxies keep an idle connection
SECONDS_AHEAD = 10.0  # with the pipelining buffer full, the socket is not read, and a disconnect would go unnoticed
SECONDS_TO_READ = 60.0  # for the client to read buffered data, about 64 KiB
SECONDS_TO_DISCARD = 10.0  # for the rest of a request that has been answered already
SECONDS_TO_CLOSE = 5.0  # for the client to read the last response

_BLANK_LINES = re.compile(rb"(?:\r\n){0,%d}+" % (MAX_BLANK_LINES + 1))
_HEAD_END = b"\r\n\r\n"


class HttpConnection(asyncio.Protocol):
    """In one of four states:

    | state    | exchange | framing | input                                       | timeout                            |
    |----------|----------|---------|---------------------------------------------|------------------------------------|
    | waiting  | -        | -       | the head of the next request                | SECONDS_IDLE, SECONDS_FOR_HEAD     |
    | body     | yes      | yes     | the body; reading pauses while it is unread | the application's                  |
    | answer   | yes      | -       | buffered as bytes                           | SECONDS_AHEAD, if the buffer fills |
    | discard  | -        | yes     | dropped up to the end of the body           | SECONDS_TO_DISCARD                 |

    A closing connection drops its input, for SECONDS_TO_CLOSE.
    """

    def __init__(
        self,
        app: ASGIApp,
        budget: BodyBudget,
        limit: ConnectionLimit,
        *,
        server_state: ServerState,
        **_: Any,  # other arguments that uvicorn passes
    ) -> None:
        self._app = app
        self._budget = budget
        self._limit = limit
        self._server = server_state
        self._loop = asyncio.get_running_loop()
        self._input = bytearray()
        self._searched = 0  # bytes of the input already searched for the end of a head
        self._num_blank_lines = 0  # since the last head
        self._exchange: HttpExchange | None = None
        self._framing: Framing | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._reading_timer: asyncio.TimerHandle | None = None
        self._unread_bytes = 0  # bytes that the client had not read when a timer was set
        self._writable = asyncio.Event()
        self._writable.set()
        self._is_paused = False
        self._is_closing = False
        self._must_close = False  # after the current response

    # ---- called by the event loop and by the server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._line = ClientConnection(self._transport)
        self._line.keep_body = self._keep_body
        self._peer = _address(transport.get_extra_info("peername"))
        self._local = _address(transport.get_extra_info("sockname"))
        self._server.connections.add(self)  # type: ignore[arg-type]  # uvicorn's set is of its own classes
        self._set_timer(SECONDS_FOR_HEAD)
        self._limit.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (asyncio's signature)
        self._server.connections.discard(self)
        self._limit.closed(self)
        self._is_closing = True
        self._stop_timer()
        self._stop_reading_timer()
        self._input.clear()
        self._writable.set()
        self._lose_exchange()
        self._line.lost()

    def data_received(self, data: bytes) -> None:
        if self._is_closing:
            return
        self._input += data
        self._advance()

    def eof_received(self) -> None:
        """The client has disconnected, or half-closed, which is treated the same: the transport closes."""
        self._is_closing = True
        self._set_timer(SECONDS_TO_CLOSE)

    def pause_writing(self) -> None:
        if self._reading_timer is None:
            self._expect_reading()
        self._writable.clear()
        self._line.paused()
        self._limit.waits(self)

    def resume_writing(self) -> None:
        self._stop_reading_timer()
        self._writable.set()
        self._line.resumed()
        if self._exchange is not None and self._exchange.has_whole_body:
            self._limit.works(self)

    def shutdown(self) -> None:
        """The server shuts down: close after the current response."""
        self._must_close = True
        if self._exchange is None:
            self._close()
        else:
            self._exchange.keeps_connection = False

    def drop(self) -> None:
        """The server has too many connections: close this one at once."""
        waits_for_answer = bool(self._input) or self._exchange is not None
        if waits_for_answer and not (self._is_closing or self._transport.get_write_buffer_size()):
            self.refuse(HttpError(503, "too_many_connections", "The server has too many connections at once."))
            self._transport.close()
        else:
            self._lose_exchange()
            self._transport.abort()

    # ---- called by the exchange

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        return self._server.default_headers

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    async def writable(self) -> None:
        if not self._writable.is_set():
            await self._writable.wait()

    def _keep_body(self, size: int, owner: str) -> None:
        if self._exchange is not None:
            self._budget.keep(self._exchange, size, owner)

    def wants_body(self) -> None:
        if self._is_paused:
            self._advance()

    def answered(self, exchange: HttpExchange) -> None:
        self._budget.release(exchange)
        self._exchange = None
        self._limit.waits(self)
        self._server.total_requests += 1
        if not exchange.keeps_connection or self._must_close:
            self._close()
            return
        self._set_timer(SECONDS_IDLE if self._framing is None else SECONDS_TO_DISCARD)
        if self._input or self._is_paused:  # in a later turn, so that other clients run between pipelined requests
            self._loop.call_soon(self._advance)

    def refuse(self, error: HttpError) -> None:
        """Answer a request that is not passed to the application, with an error in the usual format, and close."""
        if self._is_closing:
            return
        if self._exchange is not None and self._exchange.has_started:
            self.break_off()
            return
        if self._exchange is None and self._framing is not None:  # the request has been answered already
            self._close()
            return
        response = error_response(error)
        lines = [b"%b: %b\r\n" % header for header in (*self._server.default_headers, *response.raw_headers)]
        lines = [status_line(error.http_status), *lines, b"connection: close\r\n\r\n"]
        self._transport.write(b"".join((*lines, bytes(response.body))))
        self._lose_exchange()
        self._close(is_sending=True)

    def break_off(self) -> None:
        self._lose_exchange()
        self._is_closing = True
        self._limit.waits(self)
        # A chunked response is recognizably incomplete without its last chunk; others need a reset.
        self._transport.close() if self._line.is_chunked else self._transport.abort()
        self._set_timer(SECONDS_TO_CLOSE)

    # ---- input

    def _advance(self) -> None:
        """Process the input as far as the current state allows."""
        try:
            while self._input and not self._is_closing:
                if not (self._take_body() if self._framing is not None else self._take_head()):
                    break
        except HttpError as error:
            self.refuse(error)
        if not self._is_closing:
            self._rest_or_read()

    def _take_head(self) -> bool:
        """Begin the next request. False: its head is incomplete, or the previous request is still running."""
        if self._exchange is not None:
            return False
        data = self._input
        if data.startswith(b"\r\n"):
            self._drop_blank_lines()
        if not data or data == b"\r":
            return False
        if not 65 <= data[0] <= 90:  # such as a TLS ClientHello, in which no head ever ends
            raise HttpError(400, "invalid_http", "A request begins with a method, in capital letters.")
        end = data.find(_HEAD_END, max(0, self._searched - 3), MAX_HEAD_BYTES)
        if end < 0:
            if len(data) >= MAX_HEAD_BYTES:
                raise HttpError(
                    431, "head_too_large", f"The head of the request is larger than {MAX_HEAD_BYTES} bytes."
                )
            if not self._searched:
                self._set_timer(SECONDS_FOR_HEAD)
            self._searched = len(data)
            return False
        self._searched = self._num_blank_lines = 0
        self._stop_timer()
        head = parse_head(bytes(data[: end + 4]))
        del data[: end + 4]
        self._begin(head)
        return True

    def _drop_blank_lines(self) -> None:
        """Skip blank lines between requests (RFC 9112, 2.2). Raises HttpError beyond MAX_BLANK_LINES."""
        found = _BLANK_LINES.match(self._input)
        if found is not None and (end := found.end()):
            self._num_blank_lines += end // 2
            if self._num_blank_lines > MAX_BLANK_LINES:
                raise HttpError(400, "invalid_http", f"More than {MAX_BLANK_LINES} empty lines came before a request.")
            del self._input[:end]

    def _begin(self, head: RequestHead) -> None:
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": head.http_version,
            "server": self._local,
            "client": self._peer,
            "scheme": "http",
            "root_path": "",
            "method": head.method,
            "path": head.path,
            "raw_path": head.raw_path,
            "query_string": head.query,
            "headers": head.headers,
            "state": {},
        }
        set_client_connection(scope, self._line)
        exchange = self._exchange = HttpExchange(self, head, scope, self._line)
        framing = framing_of(head.body_length)
        self._framing = None if framing.is_complete else framing
        self._limit.waits(self)
        if framing.is_complete:
            self._limit.works(self)
            exchange.feed(b"", is_last=True)
        task = self._loop.create_task(exchange.run(self._app))
        self._server.tasks.add(task)
        task.add_done_callback(self._server.tasks.discard)

    def _take_body(self) -> bool:
        """Pass on the body. False: no more has arrived, or the application has not read enough of it."""
        framing, exchange = self._framing, self._exchange
        if framing is None or (exchange is not None and exchange.is_behind):
            return False
        content = framing.take(self._input)
        if framing.is_complete:
            self._framing = None
            if exchange is None:  # the request has been answered already
                self._set_timer(SECONDS_IDLE)
        if exchange is not None:
            exchange.awaits_continue = False
            exchange.feed(content, is_last=framing.is_complete)
            self._budget.add(exchange, len(content), self._peer[0] if self._peer else "")
            if framing.is_complete:
                self._budget.complete(exchange)
                self._limit.works(self)
        if framing.has_more:
            self._loop.call_soon(self._advance)
        return framing.is_complete

    def _rest_or_read(self) -> None:
        """Pause or resume reading from the socket, depending on how much input is buffered."""
        must_rest = self._framing is not None and self._framing.has_more
        if self._exchange is not None:
            is_full = len(self._input) >= MAX_AHEAD_BYTES
            if is_full and self._framing is None and self._timer is None:
                self._set_timer(SECONDS_AHEAD)
            must_rest = must_rest or is_full or self._exchange.is_behind
        if must_rest != self._is_paused and not self._transport.is_closing():
            self._is_paused = must_rest
            self._transport.pause_reading() if must_rest else self._transport.resume_reading()

    # ---- the end

    def _lose_exchange(self) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            self._budget.release(exchange)
            exchange.lose()

    def _close(self, *, is_sending: bool = False) -> None:
        """Close after the written data was sent.

        is_sending: the client may still send, such as the rest of a rejected head. If the socket closed at once, that
        data would cause a reset, and the client could lose the response (RFC 9112, 9.6).
        """
        self._is_closing = True
        self._limit.waits(self)
        self._input.clear()
        if self._transport.is_closing():
            return
        if self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()
        if (is_sending or self._framing is not None) and self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            self._transport.close()
        self._unread_bytes = self._transport.get_write_buffer_size()
        self._set_timer(SECONDS_TO_CLOSE)

    def _set_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self._loop.call_later(seconds, self._time_out)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        self._timer = None
        if self._is_closing and self._transport.get_write_buffer_size() < self._unread_bytes:
            self._unread_bytes = self._transport.get_write_buffer_size()  # the client still reads
            self._set_timer(SECONDS_TO_CLOSE)
        elif self._is_closing or self._exchange is not None:
            self._transport.abort()
        else:
            self._close()

    def _expect_reading(self) -> None:
        self._unread_bytes = self._transport.get_write_buffer_size()
        self._reading_timer = self._loop.call_later(SECONDS_TO_READ, self._check_reading)

    def _check_reading(self) -> None:
        if self._transport.get_write_buffer_size() < self._unread_bytes:
            self._expect_reading()
        else:
            self._transport.abort()

    def _stop_reading_timer(self) -> None:
        if self._reading_timer is not None:
            self._reading_timer.cancel()
            self._reading_timer = None


def _address(found: Any) -> tuple[str, int] | None:
    return (str(found[0]), int(found[1])) if isinstance(found, tuple) else None
