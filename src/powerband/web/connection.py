"""Bounds what uvicorn leaves open: how long the head of a request may be, how long it may take to come, and how long a
client may leave its answer unread.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any, cast

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from powerband.core.loop import error_info
from powerband.web.errors import HttpError, error_body
from powerband.web.line import ClientLine, put_line

MAX_HEAD_BYTES = 64 << 10
SECONDS_FOR_HEAD = 30.0
SECONDS_TO_READ = 60.0  # what waits to be sent, about 64 KiB


class GuardedProtocol(HttpToolsProtocol):
    """Closes connections whose request has not begun in time, whose head has no end, or whose client does not read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._in_head = True
        self._timer: asyncio.TimerHandle | None = None
        self._reading_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._line = ClientLine(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_reading_timer()
        super().connection_lost(exc)
        self._line.lost()

    def pause_writing(self) -> None:
        if self._reading_timer is None:
            self._reading_timer = self.loop.call_later(SECONDS_TO_READ, self.transport.abort)
        super().pause_writing()
        self._line.paused()

    def resume_writing(self) -> None:
        self._stop_reading_timer()
        super().resume_writing()
        self._line.resumed()

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, "head_too_large", f"The head of the request is larger than {MAX_HEAD_BYTES} bytes.")

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "invalid_http", msg)

    def on_message_begin(self) -> None:
        self._in_head = True
        self._start_timer()
        super().on_message_begin()
        put_line(cast(dict[str, Any], self.scope), self._line)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True

    def _refuse(self, status: int, code: str, message: str) -> None:
        """What cannot be handed on as a request is answered here, in the same shape as everything else."""
        body = msgspec.json.encode(error_body(error_info(HttpError(status, code, message))))
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(SECONDS_FOR_HEAD, self.transport.close)

    def _stop_reading_timer(self) -> None:
        if self._reading_timer is not None:
            self._reading_timer.cancel()
            self._reading_timer = None

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
