"""The client side of the gateway against servers that do one thing each, byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from powerband.gateway.options import NO_DESCRIPTORS, Timeouts
from powerband.gateway.proxy.attempts import UpstreamAttempts
from powerband.gateway.routes import ReplicaAddress
from powerband.gateway.upstream import client
from powerband.gateway.upstream.client import UpstreamClient
from powerband.gateway.upstream.exchange import MAX_UNREAD_BYTES
from powerband.gateway.upstream.failure import FailureKind, UpstreamFailure
from powerband.http_client.connection import ConnectionPool
from powerband.web.errors import HttpError

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
PATIENT = Timeouts(connect_s=60.0, first_byte_s=60.0, idle_s=60.0, total_s=120.0)
QUICK = Timeouts(connect_s=0.3, first_byte_s=0.3, idle_s=0.3, total_s=0.8)


@contextlib.asynccontextmanager
async def upstream_to(
    serve: Serve, tls: ssl.SSLContext | None = None, timeouts: Timeouts = PATIENT
) -> AsyncIterator[tuple[UpstreamClient, ReplicaAddress]]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await serve(reader, writer)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    upstream = UpstreamClient(timeouts)
    upstream.start()
    scheme, host = ("https", "localhost") if tls else ("http", "127.0.0.1")
    try:
        yield upstream, ReplicaAddress(id="r", url=f"{scheme}://{host}:{port}", model="m", api_key="secret")
    finally:
        await upstream.close()
        server.close()


async def request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return head + await reader.readexactly(length)


def says(*pieces: bytes, pause_s: float = 0.0) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)

    return serve


async def whole(upstream: UpstreamClient, replica: ReplicaAddress) -> bytes:
    exchange = await upstream.open(replica, "/v1/completions", b"{}")
    try:
        return await exchange.read_all(1 << 20)
    finally:
        upstream.end(exchange)


class Heard(list[str]):
    """What an exchange tells its observer."""

    def received(self) -> None:
        self.append("received")

    def paused(self) -> None:
        self.append("paused")

    def resumed(self) -> None:
        self.append("resumed")


def test_an_observer_hears_when_the_socket_is_not_read() -> None:
    async def act() -> None:
        async with upstream_to(says(CHUNKED + b"20000\r\n" + b"x" * 0x20000 + b"\r\n0\r\n\r\n")) as (upstream, replica):
            heard = Heard()
            exchange = await upstream.open(
                replica, "/", b"{}", on_sent=lambda exchange: setattr(exchange, "observer", heard)
            )
            while "paused" not in heard:
                await asyncio.sleep(0)
            size = 0
            while piece := await exchange.read():
                size += len(piece)
            upstream.end(exchange)
            assert size == 0x20000
            flow = [one for one in heard if one != "received"]
            assert flow == ["paused", "resumed"] * (len(flow) // 2)
            assert heard[0] == "received"

    asyncio.run(act())


def failure(serve: Serve, timeouts: Timeouts = PATIENT) -> str:
    async def act() -> str:
        async with upstream_to(serve, timeouts=timeouts) as (upstream, replica):
            with pytest.raises(UpstreamFailure) as caught:
                await whole(upstream, replica)
            assert upstream.num_live == 0
            return caught.value.code

    return asyncio.run(act())


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (OK, b"ok"),
        (CHUNKED + b"2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n", b"abcde"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, b"ok"),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil it closes", b"until it closes"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    ],
)
def test_every_way_to_say_where_a_body_ends(answer: bytes, body: bytes) -> None:
    async def act(pieces: tuple[bytes, ...]) -> bytes:
        async with upstream_to(says(*pieces)) as (upstream, replica):
            return await whole(upstream, replica)

    assert asyncio.run(act((answer,))) == body
    assert asyncio.run(act(tuple(answer[i : i + 1] for i in range(len(answer))))) == body


@pytest.mark.parametrize(
    ("pieces", "code"),
    [
        ((), "reset"),
        ((b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok",), "reset"),
        ((CHUNKED + b"2\r\nab\r\n",), "reset"),
        ((CHUNKED + b"zz\r\nab\r\n",), "garbage"),
        ((b"SSH-2.0-OpenSSH_9\r\n",), "garbage"),
        ((b"HTTP/1.1 200 OK\r\nX: " + b"a" * (1 << 20),), "garbage"),
        ((b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",), "garbage"),
    ],
)
def test_what_is_no_whole_answer(pieces: tuple[bytes, ...], code: str) -> None:
    assert failure(says(*pieces)) == code


def test_each_phase_has_its_limit() -> None:
    async def nothing(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    assert failure(nothing, QUICK) == "timeout"
    assert failure(says(CHUNKED, b"2\r\nab\r\n", b"", b"", b"", pause_s=0.2), QUICK) == "timeout", "between two bytes"
    assert failure(says(CHUNKED, *[b"2\r\nab\r\n"] * 10, pause_s=0.15), QUICK) == "timeout", "the whole"


def test_connections_are_used_again_and_a_stale_one_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_STALE_S", 60.0)
    connections = []

    async def closes_after_two(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(0)
        for _ in range(2):
            sent = await request(reader)
            assert b"Authorization: Bearer secret\r\n" in sent
            connections[-1] += 1
            writer.write(OK)
        await request(reader)  # the third is under way when the connection ends

    async def act() -> list[bytes]:
        async with upstream_to(closes_after_two) as (upstream, replica):
            return [await whole(upstream, replica) for _ in range(5)]

    assert asyncio.run(act()) == [b"ok"] * 5
    assert connections == [2, 2, 1]


def test_a_request_that_the_server_may_have_begun_to_process_is_not_sent_again() -> None:
    sent = []

    async def breaks_later(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent.append(await request(reader))
        writer.write(OK)
        sent.append(await request(reader))
        await asyncio.sleep(3 * client._STALE_S)

    async def act() -> None:
        async with upstream_to(breaks_later) as (upstream, replica):
            await whole(upstream, replica)
            with pytest.raises(UpstreamFailure, match="The server closed the connection"):
                await whole(upstream, replica)

    asyncio.run(act())
    assert len(sent) == 2


def test_where_nobody_listens_any_more_after_a_connection_broke_the_break_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process that ends at once with a request has not been absent: the request may be the cause."""
    monkeypatch.setattr(client, "_STALE_S", 60.0)

    async def act() -> None:
        servers: list[asyncio.Server] = []

        async def ends(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await request(reader)
            writer.write(OK)
            await request(reader)
            servers[0].close()
            writer.close()

        servers.append(await asyncio.start_server(ends, "127.0.0.1", 0))
        upstream = UpstreamClient(PATIENT)
        replica = ReplicaAddress(id="r", url=f"http://127.0.0.1:{servers[0].sockets[0].getsockname()[1]}", model="m")
        await whole(upstream, replica)
        assert await upstream.is_listening(replica, 60.0)
        with pytest.raises(UpstreamFailure) as caught:
            await whole(upstream, replica)
        assert (caught.value.code, caught.value.kind) == ("reset", FailureKind.CONNECTION)
        assert not await upstream.is_listening(replica, 60.0)
        await upstream.close()

    asyncio.run(act())


def test_a_new_connection_that_breaks_is_not_tried_again() -> None:
    tries = []

    async def breaks(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        tries.append(await request(reader))

    assert failure(breaks) == "reset"
    assert len(tries) == 1


def test_a_reader_that_does_not_read_is_not_sent_more() -> None:
    sent = []

    async def floods(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(CHUNKED)
        for _ in range(1000):
            writer.write(b"10000\r\n" + b"a" * 65536 + b"\r\n")
            await writer.drain()
            sent.append(65536)
        writer.write(b"0\r\n\r\n")

    async def act() -> tuple[int, int]:
        async with upstream_to(floods) as (upstream, replica):
            exchange = await upstream.open(replica, "/", b"", Timeouts())
            await asyncio.sleep(0.3)
            before = sum(sent)
            size = len(await exchange.read_all(1 << 30))
            upstream.end(exchange)
            return before, size

    before, size = asyncio.run(act())
    assert before < (32 << 20) + MAX_UNREAD_BYTES, "what the sockets hold, and no more"
    assert size == 65536 * 1000


def test_what_is_passed_on_can_be_held() -> None:
    got: list[bytes] = []

    async def act() -> None:
        pieces = [b"1\r\n%d\r\n" % number for number in range(8)]
        async with upstream_to(says(CHUNKED, *pieces, b"0\r\n\r\n", pause_s=0.01)) as (upstream, replica):
            exchange = await upstream.open(replica, "/", b"")

            def take(piece: bytes) -> bool:
                got.append(piece)
                if piece.startswith(b"3"):
                    exchange.hold()
                    asyncio.get_running_loop().call_later(0.4, exchange.release)
                return True

            await exchange.stream_to(take)
            upstream.end(exchange)

    asyncio.run(act())
    assert b"".join(got) == b"01234567"
    assert any(len(piece) > 1 for piece in got), "what came while it was held comes at once"


@pytest.mark.parametrize("is_whole", [True, False])
def test_what_has_ended_is_handed_on_though_it_is_held(is_whole: bool) -> None:
    """Or its place at the replica would be kept for as long as the client does not read."""
    got: list[bytes] = []

    async def act() -> None:
        async with upstream_to(says(CHUNKED, b"5\r\nfirst\r\n", pause_s=0.01)) as (upstream, replica):
            exchange = await upstream.open(replica, "/", b"")

            def take(piece: bytes) -> bool:
                got.append(piece)
                exchange.hold()
                asyncio.get_running_loop().call_soon(end)
                return True

            def end() -> None:
                if not exchange.is_over:
                    exchange.on_body(b"rest")
                    exchange.on_message_complete() if is_whole else exchange.fail("lost", "it is gone")

            async with asyncio.timeout(10):
                if is_whole:
                    await exchange.stream_to(take)
                else:
                    with pytest.raises(UpstreamFailure):
                        await exchange.stream_to(take)
            upstream.end(exchange)

    asyncio.run(act())
    assert got == [b"first", b"rest"]


def test_the_limit_for_the_whole_goes_on_while_a_client_does_not_read() -> None:
    async def floods(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(CHUNKED)
        while True:
            writer.write(b"10000\r\n" + b"a" * 65536 + b"\r\n")
            await writer.drain()

    async def act() -> str:
        async with upstream_to(floods, timeouts=QUICK) as (upstream, replica):
            exchange = await upstream.open(replica, "/", b"")

            def take(_piece: bytes) -> bool:
                exchange.hold()
                return True

            with pytest.raises(UpstreamFailure) as caught:
                async with asyncio.timeout(20):
                    await exchange.stream_to(take)
            return caught.value.code

    assert asyncio.run(act()) == "timeout"


@pytest.mark.parametrize(
    ("chunk", "is_whole"),
    [(b"1\r\na\r\n", False), (b"4\r\naaaa\r\n", False), (b"5\r\naaaaa\r\n", True), (b"1;x=y\r\na\r\n", False)],
)
def test_a_body_has_no_more_framing_than_content(chunk: bytes, is_whole: bool) -> None:
    serve = says(CHUNKED, chunk * 100_000, b"0\r\n\r\n")

    async def act() -> int:
        async with upstream_to(serve) as (upstream, replica):
            return len(await whole(upstream, replica))

    if is_whole:
        assert asyncio.run(act()) == 500_000
    else:
        assert failure(serve) == "garbage"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
@pytest.mark.parametrize("failures", [1, 2])
def test_the_gateways_own_limit_of_open_files_is_no_fault_of_a_replica(
    number: int, failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, take = [], ConnectionPool.take

    async def fails(pool: ConnectionPool, connect_s: float | None = None) -> Any:
        tries.append(pool)
        if len(tries) <= failures:
            raise OSError(number, "Too many open files")
        return await take(pool, connect_s)

    async def act() -> None:
        async with upstream_to(says(CHUNKED, b"0\r\n\r\n")) as (upstream, replica):
            monkeypatch.setattr(ConnectionPool, "take", fails)
            if failures == 1:  # idle connections were closed
                assert await whole(upstream, replica) == b""
                return
            with pytest.raises(UpstreamFailure) as caught:
                await whole(upstream, replica)
            assert (caught.value.code, caught.value.kind) == (NO_DESCRIPTORS, FailureKind.GATEWAY_LIMIT)

            outcomes: list[str] = []
            request: Any = SimpleNamespace(model="m")
            attempts = UpstreamAttempts(request, None, upstream, max_attempts=3)  # type: ignore[arg-type]
            attempts._lease = SimpleNamespace(  # type: ignore[assignment]
                close=lambda outcome, **_more: outcomes.append(outcome), replica=replica
            )
            with pytest.raises(HttpError) as refusal:
                await attempts.handle_failure(caught.value)
            assert (refusal.value.http_status, refusal.value.code) == (503, "too_many_connections")
            assert outcomes == ["cancelled"]

    asyncio.run(act())


def test_a_connection_refused_is_said_at_once() -> None:
    async def act() -> str:
        upstream = UpstreamClient(QUICK)
        with pytest.raises(UpstreamFailure) as caught:
            await upstream.open(ReplicaAddress(id="r", url="http://127.0.0.1:9", model="m"), "/", b"")
        return caught.value.code

    assert asyncio.run(act()) == "connect"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_replicas_may_be_reached_by_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command: list[Any] = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-keyout", key]
    command += ["-out", certificate, "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def act() -> bytes:
        async with upstream_to(says(OK), tls=context) as (upstream, replica):
            return await whole(upstream, replica)

    with pytest.raises(UpstreamFailure, match="certificate"):
        asyncio.run(act())
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert asyncio.run(act()) == b"ok"
