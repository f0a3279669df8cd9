"""A server of ours in this process, with an application that keeps what it sees, and raw connections to it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import uvloop
from starlette.types import Receive, Scope, Send

from powerband.web.listening import listen, make_server

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
PATIENCE_S = 20.0


class Recorder:
    """Answers with the path. seen: path and body of every request. left: paths whose client left before the answer.

    /hold: answered when `release` is set. /early: answered without its body being read. /slow-reader: keeps its body.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[str, bytes]] = []
        self.left: list[str] = []
        self.release = asyncio.Event()
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, body = scope["path"], b""
        self.running += 1
        try:
            while path != "/early":
                message = await receive()
                if message["type"] == "http.disconnect":
                    self.left.append(path)
                    return
                body += message["body"]
                if not message["more_body"]:
                    break
            self.seen.append((path, body))
            if path == "/hold" and not await self._held(receive):
                self.left.append(path)
                return
            await answer(send, path.encode())
        finally:
            self.running -= 1

    async def _held(self, receive: Receive) -> bool:
        """False: the client left first."""
        leaving, release = asyncio.create_task(_leaving(receive)), asyncio.create_task(self.release.wait())
        await asyncio.wait((leaving, release), return_when=asyncio.FIRST_COMPLETED)
        held = not leaving.done()
        leaving.cancel()
        release.cancel()
        return held


async def _leaving(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def answer(send: Send, body: bytes) -> None:
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def serving(app: Any, max_body_bytes: int = 4 << 20) -> AsyncIterator[int]:
    """The port."""
    listener = listen("127.0.0.1", 0)
    server, is_over = make_server(app, max_body_bytes), asyncio.Event()

    async def main_loop() -> None:
        """Without uvicorn's own pauses of a tenth of a second, of which the last one would be waited for."""
        await server.on_tick(0)
        await is_over.wait()

    server.main_loop = main_loop  # type: ignore[method-assign]
    task = asyncio.create_task(server.serve([listener]))
    await until(lambda: server.started)
    try:
        yield listener.getsockname()[1]
    finally:
        server.force_exit = True
        is_over.set()
        await task


async def until(condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


async def connect(port: int) -> Stream:
    return await asyncio.open_connection("127.0.0.1", port)


async def ends(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the server closes the connection."""
    found = b""
    async with asyncio.timeout(PATIENCE_S):
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(1 << 16):
                found += piece
    return found


async def exchange(port: int, data: bytes) -> bytes:
    """What comes back for `data` until the connection is closed; `data` asks for that, or is refused."""
    reader, writer = await connect(port)
    with contextlib.suppress(ConnectionError):
        writer.write(data)
        await writer.drain()
    found = await ends(reader)
    writer.close()
    return found


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    uvloop.run(scenario())  # type: ignore[arg-type]  # a coroutine


def request(path: str, *lines: str, method: str = "GET", body: bytes = b"") -> bytes:
    head = "".join(f"{line}\r\n" for line in (f"{method} {path} HTTP/1.1", "Host: localhost", *lines))
    return head.encode("latin-1") + b"\r\n" + body
