"""Listening sockets, uvicorn with Powerband's own HTTP connection, and graceful shutdown on signals."""

from __future__ import annotations

import asyncio
import contextlib
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
from powerband.web.acceptor import Acceptor
from powerband.web.body_budget import BODIES_AT_ONCE, BodyBudget
from powerband.web.connection import HttpConnection
from powerband.web.connection_limit import ConnectionLimit

_BACKLOG = 2048
_OTHER_DESCRIPTORS = 64  # for files, pipes and short-lived descriptors


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
        self.servers = [Acceptor(listener, make_protocol) for listener in sockets or ()]  # type: ignore[misc]
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
