"""Listening sockets, uvicorn with Powerband's own HTTP connection, and graceful shutdown on signals."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from powerband.errors import EnvironmentFault
from powerband.web.body_budget import BODIES_AT_ONCE, BodyBudget
from powerband.web.connection import HttpConnection
from powerband.web.connection_limit import ConnectionLimit

logger = logging.getLogger(__name__)

_BACKLOG = 2048
MAX_ACCEPTS_OF_A_TURN = 128  # each takes some 50 µs
_PAUSE_S = 1.0  # when the process has no file descriptor or memory left
_OTHER_DESCRIPTORS = 64  # for files, pipes and short-lived descriptors


class Acceptor:
    """Accepts the connections of a listening socket until `close`: all that wait, in one turn of the event loop.

    uvloop's own server accepts one a turn, so that after a burst, or while turns are long, new clients would wait for
    seconds behind others.
    """

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


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handling, which this module replaces, and with a faster way to accept connections."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        make_connection = cast(Callable[..., asyncio.Protocol], self.config.http_protocol_class)
        make_protocol = partial(
            make_connection,
            config=self.config,
            server_state=self.server_state,
            app_state={},
        )
        # uvicorn uses only their `close` and `wait_closed`.
        self.servers = cast(list[asyncio.Server], [Acceptor(listener, make_protocol) for listener in sockets or ()])
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Signals:
    """The first signal requests a graceful shutdown, the second an immediate one."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.received: signal.Signals | None = None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._receive, number)

    def _receive(self, number: signal.Signals) -> None:
        if self.received is None:
            self.received = number
            self.first.set()
        else:
            self.second.set()


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open files, often 1,024, to the hard limit: each connection needs a descriptor."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def max_connections() -> int:
    """The maximum number of client connections. As many descriptors are left for connections to replicas."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else max(1, (soft - _OTHER_DESCRIPTORS) // 2)


def make_server(app: ASGIApp, max_body_bytes: int) -> HttpServer:
    """max_body_bytes: of one request; all requests together may hold `BODIES_AT_ONCE` times that."""
    budget, limit = BodyBudget(BODIES_AT_ONCE * max_body_bytes), ConnectionLimit(max_connections())
    connection = partial(HttpConnection, app, budget, limit)
    return HttpServer(
        uvicorn.Config(
            app,
            http=cast(type[asyncio.Protocol], connection),
            loop="none",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
        )
    )


def listen(host: str, port: int) -> socket.socket:
    """Bind before anything slow starts, so that a port in use is reported at once. Raises EnvironmentFault."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise EnvironmentFault(
            f"Cannot listen on {host} port {port}: {error.strerror or error}.",
            hint="Choose another with --port, or end the process that has it.",
            code="cannot_listen",
            param="port",
        ) from error
    listener.setblocking(False)
    return listener


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free now; another process may take it first."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


def is_port_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def url_of(host: str, listener: socket.socket) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"
