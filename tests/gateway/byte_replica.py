"""A replica on loopback that answers byte by byte what a test tells it to, in a thread of the test's own process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Play = Callable[[asyncio.StreamWriter, dict[str, Any]], Awaitable[None]]


@dataclass
class ByteReplica:
    """play: writes the answer to a request to generate. posts: bodies of those that came."""

    url: str = ""
    play: Play | None = None
    owner: str = "other"
    paths: tuple[str, ...] = ("/v1/models",)  # that answer 200 to GET
    posts: list[dict[str, Any]] = field(default_factory=list)
    gets: list[str] = field(default_factory=list)
    post_paths: list[str] = field(default_factory=list)  # of `posts`

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                length = int(head.lower().partition("content-length: ")[2].partition("\r\n")[0] or 0)
                body = await reader.readexactly(length)
                if head.startswith("POST"):
                    self.posts.append(json.loads(body))
                    self.post_paths.append(head.split(" ")[1])
                    assert self.play is not None
                    await self.play(writer, self.posts[-1])
                else:
                    path = head.split(" ")[1]
                    self.gets.append(path)
                    card = {"id": "inner", "owned_by": self.owner}
                    writer.write(answer(json.dumps({"data": [card]}), status=200 if path in self.paths else 404))
                await writer.drain()
        writer.close()


def answer(body: str | bytes, *, status: int = 200, headers: str = "", kind: str = "application/json") -> bytes:
    """One whole HTTP message."""
    data = body.encode() if isinstance(body, str) else body
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\n{headers}Content-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


@contextlib.contextmanager
def byte_replica(play: Play | None = None, **more: Any) -> Iterator[ByteReplica]:
    found = ByteReplica(play=play, **more)
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(found.handle, "127.0.0.1", 0, limit=1 << 20))
    found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        server.close()
        loop.run_until_complete(_end_all())
        loop.close()


async def _end_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
