"""Serve one replica until a signal ends it: listen, start the engine, show what was started, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator

import uvicorn
import uvloop
from starlette.types import ASGIApp

from powerband.engine.messages import EngineInfo
from powerband.engine.supervisor import EngineProcess
from powerband.errors import EnvironmentFault
from powerband.metrics.logging import set_up_logging
from powerband.server.app import make_app
from powerband.server.connection import GuardedProtocol
from powerband.server.replica import Replica
from powerband.server.settings import ServerSettings
from powerband.spec.settings import EngineSettings

logger = logging.getLogger(__name__)

INTERRUPTED = 130
_BACKLOG = 2048
_LAST_WORDS_S = 1.0  # for the answers to requests that did not end in time


def serve(
    engine_settings: EngineSettings,
    server_settings: ServerSettings,
    make_engine: Callable[..., EngineProcess] = EngineProcess,
) -> int:
    """Serve until SIGTERM (returns 0) or Ctrl-C (130). Raises PowerbandError when the start fails.

    The first signal drains: not ready, no new requests, running ones may end. The second ends at once.
    """
    set_up_logging(server_settings.log_level, server_settings.log_format)
    with _listen(server_settings) as listener:
        return uvloop.run(_serve(engine_settings, server_settings, listener, make_engine))


class _Server(uvicorn.Server):
    """uvicorn, with its handling of signals left to this module."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(
    engine_settings: EngineSettings,
    server_settings: ServerSettings,
    listener: socket.socket,
    make_engine: Callable[..., EngineProcess],
) -> int:
    start_s = time.monotonic()
    replica = Replica(engine_settings, server_settings, make_engine)
    server = _make_server(make_app(replica))
    signals = _Signals()
    listening = asyncio.create_task(server.serve([listener]), name="http")
    starting = asyncio.create_task(replica.start(), name="start")
    ending = asyncio.create_task(signals.first.wait(), name="signal")
    try:
        await asyncio.wait({starting, ending, listening}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            _show(starting.result(), replica.seconds, time.monotonic() - start_s, _url(server_settings, listener))
            await asyncio.wait({ending, listening}, return_when=asyncio.FIRST_COMPLETED)
            await _drain(replica, signals, server_settings.drain_timeout_s)
    finally:
        starting.cancel()
        ending.cancel()
        await asyncio.gather(starting, ending, return_exceptions=True)
        await replica.stop()
        server.should_exit = True
        if not listening.done():
            await asyncio.wait({listening}, timeout=_LAST_WORDS_S)
        server.force_exit = True
        await asyncio.gather(listening, return_exceptions=True)
    return INTERRUPTED if signals.received == signal.SIGINT else 0


class _Signals:
    """The first signal asks for an orderly end, the second for an immediate one."""

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


async def _drain(replica: Replica, signals: _Signals, timeout_s: float) -> None:
    if replica.num_active:
        logger.info("Draining: %d requests may take %.0f s more.", replica.num_active, timeout_s)
    drained = asyncio.create_task(replica.drain(timeout_s))
    second = asyncio.create_task(signals.second.wait())
    await asyncio.wait({drained, second}, return_when=asyncio.FIRST_COMPLETED)
    if not (drained.done() and drained.result()):
        logger.warning("%d requests are ended unfinished.", replica.num_active)
    for task in (drained, second):
        task.cancel()
    await asyncio.gather(drained, second, return_exceptions=True)


def _make_server(app: ASGIApp) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            http=GuardedProtocol,
            loop="none",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,  # longer than most proxies keep an idle connection
            timeout_graceful_shutdown=1,
        )
    )


def _listen(settings: ServerSettings) -> socket.socket:
    """Taken before the engine starts, so that a port in use is known at once. Raises EnvironmentFault."""
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
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
            f"Cannot listen on {settings.host} port {settings.port}: {error.strerror or error}.",
            hint="Choose another with --port, or end the process that has it.",
            code="cannot_listen",
            param="port",
        ) from error
    listener.setblocking(False)
    return listener


def _url(settings: ServerSettings, listener: socket.socket) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{listener.getsockname()[1]}/v1"


def _show(info: EngineInfo, phases: dict[str, float], seconds: float, url: str) -> None:
    """The start-up block, on stderr: stdout belongs to results."""
    parts = ", ".join(f"{name} {phase_s:.2f} s" for name, phase_s in phases.items())
    sys.stderr.write(f"{info.summary.rstrip()}\nready      in {seconds:.2f} s: {parts}\nURL        {url}\n")
    sys.stderr.flush()
