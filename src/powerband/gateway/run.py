"""Run a gateway until a signal ends it: listen, open the database, load the routes, serve, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import uvloop

from powerband.engines.base import ServerName
from powerband.errors import UsageError
from powerband.folders import state_home
from powerband.gateway.accounts.accounts import Accounts, has_admin_key
from powerband.gateway.app import make_app
from powerband.gateway.discovery import discover
from powerband.gateway.gateway import Gateway
from powerband.gateway.observability.access_log import log_request
from powerband.gateway.observability.metrics import GatewayMetrics
from powerband.gateway.observability.tracing import Tracing
from powerband.gateway.routes import Routes
from powerband.gateway.settings import GatewaySettings
from powerband.gateway.trace_context import continue_trace
from powerband.gateway.upstream.client import UpstreamClient
from powerband.metrics.logging import set_up_logging
from powerband.web.access import is_loopback
from powerband.web.listening import Signals, listen, make_server, raise_descriptor_limit, stopping_text, url_of

logger = logging.getLogger(__name__)

INTERRUPTED = 130
_FINAL_ERRORS_S = 1.0  # to send errors to requests that did not finish in time


def serve(
    settings: GatewaySettings,
    routes: Routes | None = None,
    replicas: Sequence[str] = (),
    engine: ServerName | None = None,
) -> int:
    """Serve until SIGTERM (returns 0) or Ctrl-C (130). Raises PowerbandError when the start fails.

    routes: what to serve. replicas: instead, URLs of replicas, which are asked what they serve. engine: what these
    replicas run; None: detected. Without routes and replicas: the routes of the last run.
    The first signal starts to drain: not ready, no new requests, running ones finish. The second stops at once.
    """
    set_up_logging(settings.log_level, settings.log_format)
    if settings.auth == "open" and not is_loopback(settings.host):
        raise UsageError(
            f"Listening on {settings.host} without keys would let anyone use the replicas.",
            hint="Use --auth keys.",
            param="auth",
        )
    raise_descriptor_limit()
    database = Path(settings.database) if settings.database else state_home() / "gateway" / "gateway.db"
    with listen(settings.host, settings.port) as listener:
        accounts = Accounts.open(database, settings.accounts)
        try:
            key_file = database.with_name("admin.key")
            # Without an admin key, no other keys could be created.
            if not accounts.keys.admins() or (key_file.exists() and not has_admin_key(key_file)):
                accounts.make_admin_key(key_file, "first")
            find = partial(discover, urls=replicas, engine=engine) if replicas else None
            return uvloop.run(_serve(settings, listener, accounts, database, routes, find))
        finally:
            accounts.close()


async def _serve(
    settings: GatewaySettings,
    listener: socket.socket,
    accounts: Accounts,
    database: Path,
    routes: Routes | None,
    find: Callable[[UpstreamClient], Awaitable[Routes]] | None,
) -> int:
    start_s = time.monotonic()
    signals = Signals()
    gateway = Gateway(settings, database.with_name("routes.json"))
    metrics = GatewayMetrics(address=settings.host, port=listener.getsockname()[1])
    gateway.sinks += [metrics.observe, accounts.usage_log.note]
    if settings.access_log:
        gateway.sinks.append(log_request)
    tracing = Tracing(settings.otlp_endpoint) if settings.otlp_endpoint is not None else None
    if tracing is not None:
        gateway.sinks.append(tracing.note)
        gateway.trace = partial(continue_trace, share=settings.trace_sample_ratio)
    gateway.routes_changed = lambda: metrics.serve(gateway.routes.models)
    gateway.start()
    server = make_server(make_app(gateway, accounts, metrics), settings.max_body_bytes)
    listening: asyncio.Task[None] | None = None
    ending = asyncio.create_task(signals.first.wait(), name="signal")
    try:
        found = routes or gateway.stored_routes() if find is None else await _until(ending, find(gateway.upstream))
        if found is not None:
            gateway.set_routes(found)
        if ending.done():  # while it waited for a replica
            return INTERRUPTED if signals.received == signal.SIGINT else 0
        listening = asyncio.create_task(server.serve([listener]), name="http")
        _tune_gc()
        _show(gateway, time.monotonic() - start_s, url_of(settings.host, listener), database)
        await asyncio.wait({ending, listening}, return_when=asyncio.FIRST_COMPLETED)
        await _drain(gateway, signals)
    finally:
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)
        server.should_exit = True
        if listening is not None and not listening.done():
            await asyncio.wait({listening}, timeout=_FINAL_ERRORS_S)
        server.force_exit = True
        await asyncio.gather(*([listening] if listening is not None else ()), return_exceptions=True)
        await gateway.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)
    return INTERRUPTED if signals.received == signal.SIGINT else 0


async def _until(ending: asyncio.Task[bool], work: Awaitable[Routes]) -> Routes | None:
    """What the work finds; None if `ending` is done before."""
    finding = asyncio.ensure_future(work)
    try:
        await asyncio.wait({finding, ending}, return_when=asyncio.FIRST_COMPLETED)
        return finding.result() if finding.done() else None
    finally:
        finding.cancel()
        await asyncio.gather(finding, return_exceptions=True)


async def _drain(gateway: Gateway, signals: Signals) -> None:
    timeout_s = gateway.settings.drain_timeout_s
    if signals.received is not None:
        logger.info("%s", stopping_text(signals.received, gateway.num_active, timeout_s))
    drained = asyncio.create_task(gateway.drain(timeout_s))
    second = asyncio.create_task(signals.second.wait())
    await asyncio.wait({drained, second}, return_when=asyncio.FIRST_COMPLETED)
    if not (drained.done() and drained.result()):
        logger.warning("Ending %d unfinished requests.", gateway.num_active)
    for task in (drained, second):
        task.cancel()
    await asyncio.gather(drained, second, return_exceptions=True)


def _tune_gc() -> None:
    """Loaded modules stay in memory, and requests leave few reference cycles; each collection is a pause."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _show(gateway: Gateway, seconds: float, url: str, database: Path) -> None:
    """Print the start-up block on stderr: stdout is for results."""
    models = gateway.routes.models
    lines = [f"model      {', '.join((one.name, *one.aliases))}, replicas: {len(one.replicas)}" for one in models]
    lines = lines or [
        "model      none yet: give --replica URL or --routes FILE, or set the routes with PUT /admin/routes"
    ]
    lines += [f"database   {database}", f"ready      in {seconds:.2f} s", f"URL        {url}"]
    with contextlib.suppress(OSError):  # stderr may be a file on a full disk
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()
