"""The upstream client: sends requests to replicas over keep-alive connections, with a timeout for each phase."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable, Collection, Mapping

from powerband.gateway.options import NO_DESCRIPTORS, Timeouts
from powerband.gateway.routes import ReplicaAddress
from powerband.gateway.upstream.exchange import UpstreamExchange
from powerband.gateway.upstream.failure import FailureKind, UpstreamFailure
from powerband.http_client.connection import ConnectionPool, OutboundConnection, request_head
from powerband.http_client.problems import connection_problem

MAX_PAGE_BYTES = 1 << 20  # of metrics, model lists and the like: engines' pages have about 100 kB
MAX_IDLE = 128  # idle connections per replica
IDLE_S = 20.0  # idle timeout; vLLM's and Powerband's servers keep connections for longer, uvicorn by default for 5 s
_OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
_STALE_S = 0.05  # a reused connection that breaks within this time of the request had been closed while it was idle
_DRAIN_S = 1.0
_TICK_S = 0.1


def _ignore(_exchange: UpstreamExchange) -> None:
    pass


class UpstreamClient:
    """Exchanges with any replica. Belongs to one event loop, from `start` to `close`."""

    def __init__(self, timeouts: Timeouts | None = None) -> None:
        self.timeouts = timeouts or Timeouts()
        self._pools: dict[str, ConnectionPool] = {}
        self._live: set[UpstreamExchange] = set()
        self._ticking: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._ticking = asyncio.create_task(self._tick(), name="upstream")

    async def close(self) -> None:
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.gather(self._ticking, return_exceptions=True)
        for exchange in tuple(self._live):
            exchange.close()
        self.close_others(())

    def close_others(self, urls: Collection[str]) -> None:
        """Close idle connections to all URLs but these; a connection in use closes when its exchange ends."""
        for url in [url for url in self._pools if url not in urls]:
            self._pools.pop(url).close()

    @property
    def num_live(self) -> int:
        return len(self._live)

    async def fetch(self, replica: ReplicaAddress, path: str, timeout_s: float) -> tuple[int, bytes]:
        """GET a path. Raises OSError (including UpstreamFailure and TimeoutError)."""
        return await self.ask(replica, "GET", path, b"", timeout_s)

    async def ask(
        self, replica: ReplicaAddress, method: str, path: str, body: bytes, timeout_s: float
    ) -> tuple[int, bytes]:
        """Send a request. Returns the status and the whole body. Raises OSError."""
        timeouts = Timeouts(connect_s=timeout_s, first_byte_s=timeout_s, idle_s=timeout_s, total_s=timeout_s)
        async with asyncio.timeout(timeout_s):
            exchange = await self.open(replica, path, body, timeouts, method=method)
            try:
                return exchange.status, await exchange.read_all(MAX_PAGE_BYTES)
            finally:
                self.end(exchange)

    async def open(
        self,
        replica: ReplicaAddress,
        path: str,
        body: bytes,
        timeouts: Timeouts | None = None,
        *,
        method: str = "POST",
        headers: Mapping[str, str] | None = None,
        on_sent: Callable[[UpstreamExchange], None] = _ignore,
    ) -> UpstreamExchange:
        """Send a request, and return when the response head has arrived. Raises UpstreamFailure. Call `end` afterwards.

        on_sent: called with the exchange before the response head arrives, so that others can make it fail.

        If a reused connection breaks within `_STALE_S`, the server had most likely closed it while it was idle, so the
        request is sent once more, on a new connection. If it breaks later, the server may have begun to process the
        request (RFC 9110, section 9.2.2). If no server listens any more, the request may be what ended it: this is
        reported as the broken connection.
        """
        limits = timeouts or self.timeouts
        pool = self._pool(replica.url)
        lines = {"Authorization": f"Bearer {replica.api_key}"} if replica.api_key else {}
        head = request_head(method, pool.prefix + path, pool.authority, len(body), {**lines, **(headers or {})})
        broken: UpstreamFailure | None = None
        while True:
            try:
                connection, was_used = await self._take(pool, limits.connect_s)
            except UpstreamFailure as problem:
                raise broken or problem from None
            now_s = time.monotonic()
            exchange = UpstreamExchange(now_s + limits.first_byte_s, limits.idle_s, now_s + limits.total_s)
            self._live.add(exchange)
            connection.send((head, body), exchange)
            on_sent(exchange)
            try:
                await exchange.read_head()
            except UpstreamFailure as problem:
                self.end(exchange)
                is_early = not exchange.received_s and time.monotonic() - now_s < _STALE_S
                if broken is None and was_used and is_early and problem.code == "reset":
                    broken = problem
                    pool.drop_idle()  # its other idle connections are as old
                    continue
                raise
            except BaseException:
                self.end(exchange)
                raise
            return exchange

    async def is_listening(self, replica: ReplicaAddress, timeout_s: float) -> bool:
        """Whether the replica's server accepts a connection now."""
        pool = self._pool(replica.url)
        try:
            connection, _ = await self._take(pool, timeout_s)
        except UpstreamFailure as problem:
            return problem.kind is FailureKind.GATEWAY_LIMIT  # says nothing about the replica
        connection.finish(is_reusable=True)
        return True

    def end(self, exchange: UpstreamExchange) -> None:
        exchange.close()
        self._live.discard(exchange)

    def drain(self, exchange: UpstreamExchange) -> None:
        """The last event has arrived: read the end of the response in the background, to reuse the connection."""
        if exchange.drain(time.monotonic() + _DRAIN_S):
            self._live.discard(exchange)

    def _pool(self, url: str) -> ConnectionPool:
        pool = self._pools.get(url)
        if pool is None:
            pool = self._pools[url] = ConnectionPool(url, max_idle=MAX_IDLE)
        return pool

    async def _take(self, pool: ConnectionPool, connect_s: float) -> tuple[OutboundConnection, bool]:
        """A connection, and whether it was used before. Raises UpstreamFailure."""
        try:
            try:
                return await pool.take(connect_s)
            except OSError as problem:
                if problem.errno not in _OUT_OF_DESCRIPTORS:
                    raise
                for other in self._pools.values():
                    other.drop_idle()
                await asyncio.sleep(0)  # lets the transports close
                return await pool.take(connect_s)
        except TimeoutError:
            raise UpstreamFailure("connect", f"No connection to {pool.authority} within {connect_s:g} s.") from None
        except OSError as problem:
            message = f"No connection to {pool.authority}: {connection_problem(problem)}."
            if problem.errno in _OUT_OF_DESCRIPTORS:
                raise UpstreamFailure(NO_DESCRIPTORS, message, FailureKind.GATEWAY_LIMIT) from None
            kind = FailureKind.UNAVAILABLE if isinstance(problem, ConnectionRefusedError) else FailureKind.CONNECTION
            raise UpstreamFailure("connect", message, kind) from None

    async def _tick(self) -> None:
        """Check all timeouts with one timer: a timer per stream would be reset with every chunk."""
        while True:
            await asyncio.sleep(_TICK_S)
            now_s = time.monotonic()
            late = [exchange for exchange in self._live if exchange.due_s and exchange.due_s < now_s]
            for exchange in late:
                exchange.fail("timeout", "the replica did not answer in time")
            self._live -= {exchange for exchange in self._live if exchange.is_draining and exchange.is_over}
            for pool in self._pools.values():
                pool.drop_idle(now_s - IDLE_S)
