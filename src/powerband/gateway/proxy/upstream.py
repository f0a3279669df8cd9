"""The client side: requests to replicas over connections that are kept, with a time limit for each phase."""

from __future__ import annotations

import asyncio
import contextlib
import math
import ssl
import time
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

import msgspec

from powerband.gateway.options import Timeouts
from powerband.gateway.proxy.client_request import MAX_TOKENS
from powerband.gateway.proxy.connection import ConnectionOwner, UpstreamConnection, UpstreamExchange, UpstreamFailure
from powerband.gateway.routes import ReplicaAddress
from powerband.web.authority import split_authority

if TYPE_CHECKING:
    from powerband.gateway.gateway import ServedModel

MAX_PAGE_BYTES = 1 << 20  # of metrics, lists of models and the like: engines have some 100 kB
MAX_IDLE = 128  # connections to one replica that are kept for later
IDLE_S = 20.0  # servers close what is idle for longer; uvicorn's default is 5 s, vLLM's and ours are longer
_LAST_WORDS_S = 1.0
_TICK_S = 0.1
_MODELS_TIMEOUT_S = 2.0


def _ignore(_exchange: UpstreamExchange) -> None:
    pass


class UpstreamClient:
    """Exchanges with any replica. Belongs to one event loop, from `start` to `close`."""

    def __init__(self, timeouts: Timeouts | None = None) -> None:
        self.timeouts = timeouts or Timeouts()
        self._origins: dict[str, _HostPool] = {}
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
        """Close idle connections to all others; those in use end with their exchange."""
        for url in [url for url in self._origins if url not in urls]:
            self._origins.pop(url).close()

    @property
    def num_live(self) -> int:
        return len(self._live)

    async def fetch(self, replica: ReplicaAddress, path: str, timeout_s: float) -> tuple[int, bytes]:
        """GET. Raises OSError (UpstreamFailure and TimeoutError are such)."""
        return await self.ask(replica, "GET", path, b"", timeout_s)

    async def ask(
        self, replica: ReplicaAddress, method: str, path: str, body: bytes, timeout_s: float
    ) -> tuple[int, bytes]:
        """Status and whole body. Raises OSError."""
        timeouts = Timeouts(connect_s=timeout_s, first_byte_s=timeout_s, between_s=timeout_s, whole_s=timeout_s)
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
        """Send a request; returns with the head of the answer. `end` it afterwards. Raises UpstreamFailure.

        on_sent: called with the exchange before the response head arrives, so that others can make it fail.

        A kept connection that breaks before any byte of the answer was most likely closed while the request was under
        way: the request is sent once more, on a new one.
        """
        limits = timeouts or self.timeouts
        origin = self._origin(replica.url)
        request = [origin.head(method, path, replica.api_key, len(body), headers or {}), body]
        while True:
            connection, was_used = await origin.take(limits.connect_s)
            now_s = time.monotonic()
            exchange = UpstreamExchange(
                connection, now_s + limits.first_byte_s, limits.between_s, now_s + limits.whole_s
            )
            self._live.add(exchange)
            connection.begin(exchange, request)
            on_sent(exchange)
            try:
                await exchange.read_head()
            except UpstreamFailure as problem:
                self.end(exchange)
                if was_used and not exchange.has_bytes and problem.code == "reset":
                    origin.drop_idle()  # its other idle connections are as old
                    continue
                raise
            except BaseException:
                self.end(exchange)
                raise
            return exchange

    def end(self, exchange: UpstreamExchange) -> None:
        exchange.close()
        self._live.discard(exchange)

    def drain(self, exchange: UpstreamExchange) -> None:
        """Its last event is there: what is left of it may come, so that the connection can be used again."""
        if exchange.drain(time.monotonic() + _LAST_WORDS_S):
            self._live.discard(exchange)

    def _origin(self, url: str) -> _HostPool:
        origin = self._origins.get(url)
        if origin is None:
            origin = self._origins[url] = _HostPool(url)
        return origin

    async def _tick(self) -> None:
        """One timer for all limits: a timer for each would be set and cancelled with each chunk of each stream."""
        while True:
            await asyncio.sleep(_TICK_S)
            now_s = time.monotonic()
            late = [exchange for exchange in self._live if exchange.due_s and exchange.due_s < now_s]
            for exchange in late:
                exchange.fail("timeout", "The replica did not answer in time.")
            self._live -= {exchange for exchange in self._live if exchange.is_let_end and exchange.is_over}
            for origin in self._origins.values():
                origin.drop_idle(now_s - IDLE_S)


class _HostPool(ConnectionOwner):
    """Idle connections to one server: the one used last is used next."""

    def __init__(self, url: str) -> None:
        scheme, _, rest = url.partition("://")
        authority, _, prefix = rest.partition("/")
        self._host, self._port = split_authority(authority, 443 if scheme == "https" else 80)
        self._tls = ssl.create_default_context() if scheme == "https" else None
        self._prefix = f"/{prefix.strip('/')}" if prefix.strip("/") else ""
        self._authority = authority
        self._idle: list[UpstreamConnection] = []
        self._is_closed = False

    def head(self, method: str, path: str, api_key: str, length: int, headers: Mapping[str, str]) -> bytes:
        lines = [
            f"{method} {self._prefix}{path} HTTP/1.1",
            f"Host: {self._authority}",
            "Content-Type: application/json",
            f"Content-Length: {length}",
            *([f"Authorization: Bearer {api_key}"] if api_key else ()),
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    async def take(self, connect_s: float) -> tuple[UpstreamConnection, bool]:
        """A connection, and whether it was used before. Raises UpstreamFailure."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection, True
        loop = asyncio.get_running_loop()
        name = self._host if self._tls is not None else None
        try:
            async with asyncio.timeout(connect_s):
                _, connection = await loop.create_connection(
                    lambda: UpstreamConnection(self), self._host, self._port, ssl=self._tls, server_hostname=name
                )
        except TimeoutError:
            raise UpstreamFailure("connect", f"No connection to {self._authority} within {connect_s:g} s.") from None
        except OSError as problem:
            message = f"No connection to {self._authority}: {problem}."
            raise UpstreamFailure("connect", message, is_absence=isinstance(problem, ConnectionRefusedError)) from None
        return connection, False

    def free(self, connection: UpstreamConnection) -> None:
        if connection.is_open and not self._is_closed and len(self._idle) < MAX_IDLE:
            self._idle.append(connection)
        else:
            connection.abort()

    def lost(self, connection: UpstreamConnection) -> None:
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)

    def drop_idle(self, before_s: float = math.inf) -> None:
        """Close those that were free before `before_s`. The oldest come first."""
        while self._idle and self._idle[0].idle_since_s < before_s:
            self._idle.pop(0).abort()

    def close(self) -> None:
        """Keep no connection from now on."""
        self._is_closed = True
        self.drop_idle()


# ---- the context length of a model


class _Card(msgspec.Struct):
    id: str = ""
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[_Card] = []


_CARDS = msgspec.json.Decoder(_Cards)


async def context_length(served: ServedModel, upstream: UpstreamClient) -> int | None:
    """The maximum tokens of prompt and output: the largest of the replicas' limits; None: no replica reports one.

    A replica with a lower one gets requests with a lower cap, so that none cuts the answers of the others.
    """
    known = served.context_lengths
    replicas = served.route.replicas
    await asyncio.gather(*(_ask(known, upstream, one) for one in replicas if one.id not in known))
    lengths = [length for one in replicas if (length := known.get(one.id)) is not None]
    return min(max(lengths), MAX_TOKENS) if lengths else None


async def _ask(known: dict[str, int | None], upstream: UpstreamClient, replica: ReplicaAddress) -> None:
    """One that does not answer is asked again the next time."""
    try:
        status, body = await upstream.ask(replica, "GET", "/v1/models", b"", _MODELS_TIMEOUT_S)
        cards = _CARDS.decode(body).data if status == 200 else []
    except OSError:
        return
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        cards = []
    lengths = [card.max_model_len for card in cards if card.id == replica.model]
    known[replica.id] = next((length for length in lengths if length is not None and length > 0), None)
