"""Listening sockets, uvicorn with Powerband's own HTTP connection, and graceful shutdown on signals."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from functools import partial
from typing import cast

import psutil
import uvicorn
from starlette.types import ASGIApp

from powerband.errors import EnvironmentFault
from powerband.web.body_budget import BODIES_AT_ONCE, BodyBudget
from powerband.web.http1.connection import HttpConnection
from powerband.web.http1.connection_limit import ConnectionLimit

_BACKLOG = 2048
_MAX_COMMAND_CHARACTERS = 100
_OTHER_DESCRIPTORS = 64  # for files, pipes and short-lived descriptors


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handling, which this module replaces."""

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


def stopping_text(received: signal.Signals, num_active: int, timeout_s: float) -> str:
    """What a server says when it is asked to stop."""
    name = "Ctrl-C (SIGINT)" if received == signal.SIGINT else received.name
    if not num_active:
        return f"Stopping after {name}: no request is running."
    requests = "1 running request has" if num_active == 1 else f"{num_active} running requests have"
    return f"Stopping after {name}: {requests} {timeout_s:.0f} s to finish. A second signal stops at once."


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
        listener = _bind(host, port)
        listener.listen(_BACKLOG)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    listener.setblocking(False)
    return listener


def check_port(host: str, port: int) -> None:
    """Raises EnvironmentFault as `listen` does."""
    try:
        _bind(host, port).close()
    except OSError as error:
        raise _cannot_listen(host, port, error) from error


def is_port_free(host: str, port: int) -> bool:
    try:
        _bind(host, port).close()
    except OSError:
        return False
    return True


def _bind(host: str, port: int) -> socket.socket:
    """Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> EnvironmentFault:
    reason, hint = error.strerror or str(error), "Choose another with --port."
    if error.errno == errno.EADDRINUSE:
        user = _port_user(port)
        reason += f" by {user}" if user else ""
        hint = "Choose another with --port, or end the process that has it."
    elif error.errno == errno.EACCES:
        hint = "Ports below 1024 are for root: choose another with --port."
    elif error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
        hint = "--host is an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all of them."
    return EnvironmentFault(
        f"Cannot listen on {host} port {port}: {reason}.", hint=hint, code="cannot_listen", param="port"
    )


def _port_user(port: int) -> str:
    """'pid 123 (python -m http.server 8000)': the process that listens on the port. '': the system does not show it,
    as with a process of another user.
    """
    with contextlib.suppress(psutil.Error, OSError):
        for found in psutil.net_connections("tcp"):
            if found.status == psutil.CONN_LISTEN and found.laddr.port == port and found.pid is not None:
                command = " ".join(psutil.Process(found.pid).cmdline())
                return f"pid {found.pid} ({command[:_MAX_COMMAND_CHARACTERS]})"
    return ""


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free now; another process may take it first."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


def url_of(host: str, listener: socket.socket) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"
