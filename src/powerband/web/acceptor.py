"""Accepts connections: all that wait, in one turn of the event loop, up to a limit.

uvloop's own server accepts one connection a turn, so that after a burst, or while turns are long, new clients would
wait for seconds behind others.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

logger = logging.getLogger(__name__)

MAX_ACCEPTS_OF_A_TURN = 128  # each takes some 50 µs
_PAUSE_S = 1.0  # when the process has no file descriptor or memory left


class Acceptor:
    """Accepts the connections of a listening socket from now until `close`."""

    def __init__(self, listener: socket.socket, make_protocol: Callable[[], asyncio.Protocol]) -> None:
        """listener: not blocking; closed by its owner, after `close`."""
        self._listener = listener
        self._make_protocol = make_protocol
        self._loop = asyncio.get_running_loop()
        self._connecting: set[asyncio.Task[None]] = set()  # keeps the tasks alive
        self._resuming: asyncio.TimerHandle | None = None
        self._resume()

    def close(self) -> None:
        if self._resuming is None:
            self._loop.remove_reader(self._listener)
        else:
            self._resuming.cancel()

    async def wait_closed(self) -> None:
        """Wait for the connections that are being accepted."""
        await asyncio.gather(*self._connecting, return_exceptions=True)

    def _resume(self) -> None:
        self._resuming = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(MAX_ACCEPTS_OF_A_TURN):
            try:
                accepted, _address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as problem:
                logger.error("Cannot accept connections for %g s: %s.", _PAUSE_S, problem)
                self._loop.remove_reader(self._listener)
                self._resuming = self._loop.call_later(_PAUSE_S, self._resume)
                return
            task = self._loop.create_task(self._connect(accepted))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect(self, accepted: socket.socket) -> None:
        try:
            accepted.setblocking(False)
            if accepted.family != socket.AF_UNIX:
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(self._make_protocol, accepted)
        except OSError:
            accepted.close()  # the client has left
