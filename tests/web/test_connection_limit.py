"""Connections that are only held go when others need their place; those whose requests are worked on stay."""

from __future__ import annotations

import asyncio
import resource
import sys

import pytest
from connections_for_tests import (
    PATIENCE_S,
    Recorder,
    Stream,
    answer,
    connect,
    ends,
    exchange,
    request,
    run,
    serving,
    until,
)
from starlette.types import Receive, Scope, Send

from powerband.web import listening

MAX = 8
CLOSE = "Connection: close"
HELD = {
    "silent": b"",
    "half a head": b"GET /livez HTTP/1.1\r\nHost: ",
    "after an answer": request("/"),
    "half a body": request("/", "Content-Length: 1000", method="POST", body=b"x"),
    "rest of a body": request("/early", "Content-Length: 1000", method="POST", body=b"x"),
}


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "max_connections", lambda: MAX)


async def hold(port: int, data: bytes) -> Stream:
    reader, writer = await connect(port)
    writer.write(data)
    if data.startswith((b"GET / ", b"POST /early")):
        await reader.readuntil(b"\r\n\r\n")
    return reader, writer


@pytest.mark.parametrize("kind", HELD)
def test_who_comes_with_a_request_is_served_however_many_are_held(kind: str) -> None:
    async def scenario() -> None:
        app = Recorder()
        async with serving(app) as port:
            held = []
            for _ in range(3 * MAX):
                held.append(await hold(port, HELD[kind]))
                assert (await exchange(port, request("/next", CLOSE))).startswith(b"HTTP/1.1 200")
            first = await ends(held[0][0])
            is_told = kind in ("half a head", "half a body")
            assert (b" 503 " in first, b"too_many_connections" in first) == (is_told, is_told)
            await until(lambda: not app.running or kind == "half a body")
            assert app.running <= MAX

    run(scenario)


def test_clients_that_do_not_read_their_answers_do_not_keep_others_out() -> None:
    async def large(scope: Scope, _: Receive, send: Send) -> None:
        if scope["path"] == "/next":
            await answer(send, b"x")
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(400):  # far more than is buffered anywhere; once the connection is closed, nothing waits
            await send({"type": "http.response.body", "body": b"x" * (256 << 10), "more_body": True})

    async def scenario() -> None:
        async with serving(large) as port:
            held = []
            for _ in range(MAX):
                reader, writer = await connect(port)
                writer.transport.pause_reading()  # type: ignore[attr-defined]  # the one of asyncio can
                writer.write(request("/large"))
                await writer.drain()
                held.append((reader, writer))
            async with asyncio.timeout(PATIENCE_S):
                while not (await exchange(port, request("/next", CLOSE))).startswith(b"HTTP/1.1 200"):
                    await asyncio.sleep(0.01)  # until the server has begun all of the large answers
            for _, writer in held:
                writer.transport.abort()

    run(scenario)


def test_requests_that_are_worked_on_stay_and_new_connections_are_closed() -> None:
    async def scenario() -> None:
        app = Recorder()
        async with serving(app) as port:
            held = [await hold(port, request("/hold", CLOSE)) for _ in range(MAX)]
            await until(lambda: len(app.seen) == MAX)
            for _ in range(3):
                held.append(await connect(port))
                assert await ends(held[-1][0]) == b""
            app.release.set()
            for reader, _ in held[:MAX]:
                assert (await ends(reader)).startswith(b"HTTP/1.1 200")
            assert app.left == []
            assert (await exchange(port, request("/", CLOSE))).startswith(b"HTTP/1.1 200")

    run(scenario)


def test_the_one_that_has_waited_for_longest_goes_first() -> None:
    async def scenario() -> None:
        async with serving(Recorder()) as port:
            held = [await hold(port, request("/")) for _ in range(MAX)]
            held[0][1].write(request("/"))  # the last to wait, from its answer on
            await held[0][0].readuntil(b"\r\n\r\n")
            for reader, _ in held[1:3]:
                held.append(await connect(port))
                assert await ends(reader) == b"/"  # the body of its answer
            held[0][1].write(request("/", CLOSE))
            assert b" 200 " in await ends(held[0][0])

    run(scenario)


def test_as_many_descriptors_are_left_as_clients_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for soft, expected in ((1024, 480), (65, 1), (16, 1), (resource.RLIM_INFINITY, sys.maxsize)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert listening.max_connections() == expected
