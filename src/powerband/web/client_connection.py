"""Writes chunks straight to a client's socket: a stream of many small chunks wakes no task and skips the middleware."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import cast

from starlette.types import Scope

_EXTENSION = "powerband.line"


class ClientDisconnected(Exception):
    """The client closed its connection before the response."""


class ClientConnection:
    """One client's connection. A response's head and end go through ASGI; only the chunks in between go here.

    is_behind: written data is buffered, because the client reads slowly: write no more until `when_writable`.
    """

    __slots__ = ("_on_lost", "_on_writable", "_transport", "is_behind", "is_chunked", "is_lost", "keep_body")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._on_lost: Callable[[], None] | None = None
        self._on_writable: Callable[[], None] | None = None
        self.is_behind = False
        self.is_chunked = True  # False for HTTP/1.0, which has no chunked coding
        self.is_lost = False
        # Called with the bytes kept of the request's body, and their owner. Raises HttpError if there are too many.
        self.keep_body: Callable[[int, str], None] = _keep_any

    def write_chunk(self, data: bytes) -> None:
        """Write data as one chunk of the chunked coding. data: not empty."""
        if not self.is_lost:
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self.is_chunked else data)

    def when_writable(self, call: Callable[[], None]) -> None:
        """Call once when the client has caught up; at once if it has."""
        if self.is_behind:
            self._on_writable = call
        else:
            call()

    def when_lost(self, call: Callable[[], None] | None) -> None:
        """Call once when the client has closed its connection; at once if it has. None: do not."""
        self._on_lost = call
        if self.is_lost and call is not None:
            call()

    # Called by the connection.

    def paused(self) -> None:
        self.is_behind = True

    def resumed(self) -> None:
        self.is_behind = False
        call, self._on_writable = self._on_writable, None
        if call is not None:
            call()

    def lost(self) -> None:
        self.is_lost = True
        self._on_writable = None
        call, self._on_lost = self._on_lost, None
        if call is not None:
            call()


def _keep_any(_size: int, _owner: str) -> None:
    pass


def set_client_connection(scope: Scope, line: ClientConnection) -> None:
    scope["extensions"] = {_EXTENSION: line}


def client_connection(scope: Scope) -> ClientConnection:
    """The connection of a request that was received by Powerband's own HTTP server."""
    return cast(ClientConnection, scope["extensions"][_EXTENSION])


def cancel_this_task() -> Callable[[], None]:
    """A callback that cancels the current task, for when the client disconnects."""
    task = asyncio.current_task()

    def cancel() -> None:
        if task is not None:
            task.cancel()

    return cancel


@contextlib.contextmanager
def while_connected(scope: Scope) -> Iterator[None]:
    """Cancel the block when the client of this request closes its connection. Raises ClientDisconnected then.

    A request that was received by another HTTP server is left alone.
    """
    connection = scope.get("extensions", {}).get(_EXTENSION)
    if connection is None:
        yield
        return
    connection.when_lost(cancel_this_task())
    try:
        yield
    except asyncio.CancelledError:
        if connection.is_lost:
            raise ClientDisconnected from None
        raise
    finally:
        connection.when_lost(None)
