"""Serve one replica until a signal ends it: listen, start the engine, show what was started, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable

import uvloop

from powerband.engine.client.messages import EngineInfo
from powerband.engine.client.supervisor import EngineProcess
from powerband.metrics.logging import set_up_logging
from powerband.server.app import make_app
from powerband.server.replica import ServerState
from powerband.server.settings import ServerSettings
from powerband.server.throughput import log_throughput
from powerband.spec.settings import EngineSettings
from powerband.web.listening import Signals, listen, make_server, raise_descriptor_limit, stopping_text, url_of

logger = logging.getLogger(__name__)

INTERRUPTED = 130
_REPORT_EVERY_S = 10.0  # while it starts
_LAST_WORDS_S = 1.0  # for the answers to requests that did not end in time


def serve(
    engine_settings: EngineSettings,
    server_settings: ServerSettings,
    make_engine: Callable[..., EngineProcess] = EngineProcess,
) -> int:
    """Serve until SIGTERM (returns 0) or Ctrl-C (130). Raises PowerbandError when the start fails.

    The first signal drains: not ready, no new requests, running ones may finish. The second ends at once.
    """
    set_up_logging(server_settings.log_level, server_settings.log_format)
    raise_descriptor_limit()
    with listen(server_settings.host, server_settings.port) as listener:
        return uvloop.run(_serve(engine_settings, server_settings, listener, make_engine))


async def _serve(
    engine_settings: EngineSettings,
    server_settings: ServerSettings,
    listener: socket.socket,
    make_engine: Callable[..., EngineProcess],
) -> int:
    start_s = time.monotonic()
    replica = ServerState(engine_settings, server_settings, make_engine)
    server = make_server(make_app(replica), server_settings.max_body_bytes)
    signals = Signals()
    listening = asyncio.create_task(server.serve([listener]), name="http")
    starting = asyncio.create_task(replica.start(), name="start")
    ending = asyncio.create_task(signals.first.wait(), name="signal")
    reporting = asyncio.create_task(_report_start(replica), name="report")
    try:
        await asyncio.wait({starting, ending, listening}, return_when=asyncio.FIRST_COMPLETED)
        reporting.cancel()
        if starting.done():
            _show(
                starting.result(), replica.seconds, time.monotonic() - start_s, url_of(server_settings.host, listener)
            )
            reporting = asyncio.create_task(log_throughput(replica.metrics), name="throughput")
            await asyncio.wait({ending, listening}, return_when=asyncio.FIRST_COMPLETED)
            await _drain(replica, signals, server_settings.drain_timeout_s)
    finally:
        if signals.received is not None and not starting.done():
            logger.info("Stopping after %s, before the start was complete.", signals.received.name)
        for task in (starting, ending, reporting):
            task.cancel()
        await asyncio.gather(starting, ending, reporting, return_exceptions=True)
        await replica.stop()
        server.should_exit = True
        if not listening.done():
            await asyncio.wait({listening}, timeout=_LAST_WORDS_S)
        server.force_exit = True
        await asyncio.gather(listening, return_exceptions=True)
    return INTERRUPTED if signals.received == signal.SIGINT else 0


async def _report_start(replica: ServerState) -> None:
    """A start that takes long shows how far it is, on a terminal and without one. The kernels show it themselves."""
    began_s = time.monotonic()
    while True:
        await asyncio.sleep(_REPORT_EVERY_S)
        if not replica.phase.startswith("kernels"):
            sys.stderr.write(f"starting   {replica.phase}, {time.monotonic() - began_s:.0f} s\n")
            sys.stderr.flush()


async def _drain(replica: ServerState, signals: Signals, timeout_s: float) -> None:
    if signals.received is not None:
        logger.info("%s", stopping_text(signals.received, replica.num_active, timeout_s))
    drained = asyncio.create_task(replica.drain(timeout_s))
    second = asyncio.create_task(signals.second.wait())
    await asyncio.wait({drained, second}, return_when=asyncio.FIRST_COMPLETED)
    if not (drained.done() and drained.result()):
        logger.warning("%d requests are ended unfinished.", replica.num_active)
    for task in (drained, second):
        task.cancel()
    await asyncio.gather(drained, second, return_exceptions=True)


def _show(info: EngineInfo, phases: dict[str, float], seconds: float, url: str) -> None:
    """The start-up block, on stderr: stdout belongs to results."""
    parts = ", ".join(f"{name} {phase_s:.2f} s" for name, phase_s in phases.items())
    sys.stderr.write(f"{info.summary.rstrip()}\nready      in {seconds:.2f} s: {parts}\nURL        {url}\n")
    sys.stderr.flush()
