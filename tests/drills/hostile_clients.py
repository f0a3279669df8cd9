"""Clients, and a replica, that mean harm: each attack is bounded, and returns how many bytes it sent.

Attackers need no key and read as little as they can. Bodies are made before anything is sent, so that it is the service
that works, not this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass

from drill_loads import SERVED

LIAR = "liar"  # a model that only the lying replica serves
_MIB = 1 << 20
_PATIENCE_S = 3.0  # of a client that waits for an answer
_SEND_S = 1.5  # of one that sends


@dataclass(frozen=True)
class Doors:
    """Ports of the service: of its gateway, and of one replica that the attacker reaches as well."""

    gateway: int
    replica: int

    @property
    def both(self) -> tuple[int, int]:
        return self.gateway, self.replica


Attack = Callable[[Doors], Awaitable[int]]


def post(body: bytes, path: str = "/v1/completions") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def completion(**fields: object) -> bytes:
    return post(json.dumps({"model": SERVED, "prompt": "a", "max_tokens": 4, **fields}).encode())


async def quadratic_json(doors: Doors) -> int:
    """Brackets as deep as they may be, then escaped quotes outside any string."""
    body = post(b"[" * 65 + b'\\"' * 25_000)
    return await _all(_ask(port, body) for port in doors.both)


async def trailers(doors: Doors) -> int:
    """A chunked body that has ended, and then trailers without end."""
    head = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    return await _all(_flood(port, [head, *[b"a: b\r\n" * 10_000] * (8 * _MIB // 60_000)]) for port in doors.both)


async def pipelined_flood(doors: Doors) -> int:
    """Requests one after the other, whose answers nobody reads."""
    some = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2000
    return await _all(_flood(port, [some] * (4 * _MIB // len(some))) for port in doors.both)


async def half_sent_bodies(doors: Doors) -> int:
    """Large bodies that are never finished."""
    head = post(b"").replace(b"Content-Length: 0", b"Content-Length: 2000000")
    half = [head, b"x" * _MIB]
    return await _all(_flood(doors.gateway, half) for _ in range(40))


async def pipeline_and_leave(doors: Doors) -> int:
    """Long answers are asked for, something is sent after that, and the client is gone."""
    asked = completion(max_tokens=1900, ignore_eos=True)

    async def one(port: int) -> int:
        async with _connected(port) as (_, writer):
            writer.write(asked)
            await asyncio.sleep(0.05)
            writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await asyncio.sleep(0.05)
        return len(asked)

    return await _all(one(port) for port in doors.both for _ in range(24))


async def costly_sampling(doors: Doors) -> int:
    """Small requests whose sampling costs a lot: the product of choices and of what each one looks at."""
    many = {"prompt": ["a"] * 32, "n": 8, "max_tokens": 3}
    asked = (
        completion(**many, allowed_token_ids=[id % 4096 for id in range(32_768)]),
        completion(**many, bad_words=[f"{'x' * 250}{number:04d}" for number in range(128)]),
        completion(
            prompt="a" * 500, max_tokens=300, stop=[f"{'a' * 200}{n}" for n in range(4)], allowed_token_ids=[66]
        ),
    )
    return await _all(_ask(doors.gateway, one) for one in asked)


async def poison(doors: Doors) -> int:
    """Requests that make a model compute nonsense, or a replica choke."""
    asked = [completion(repetition_penalty=1e-39, max_tokens=8)] * 20
    asked += [completion(resume_token_ids=[70] * 100_000, max_tokens=100_001)] * 4
    return await _all(_ask(doors.gateway, one) for one in asked)


async def lying_replica(doors: Doors) -> int:
    """Requests for a model whose only replica lies in every way; what it sends counts as sent."""
    before = Liar.sent
    ways = [way for way in Liar.ways for _ in range(2)]
    await _all(_ask(doors.gateway, completion(model=LIAR, prompt=way, stream=True)) for way in ways)
    return Liar.sent - before


ATTACKS: tuple[Attack, ...] = (
    quadratic_json,
    trailers,
    pipelined_flood,
    half_sent_bodies,
    pipeline_and_leave,
    costly_sampling,
    poison,
    lying_replica,
)


async def held_open(doors: Doors, seconds: float) -> int:
    """How many of a hundred connections are there after `seconds`: each had its answer, and sent one byte more."""
    asked = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"

    async def one(port: int, then: bytes) -> int:
        with contextlib.suppress(OSError):
            async with _connected(port) as (reader, writer):
                writer.write(asked)
                await reader.readuntil(b"\r\n\r\n")
                writer.write(then)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        while await reader.read(65536):
                            continue
                        return 0
                return 1
        return 0

    kinds = [(port, then) for port in doors.both for then in (b"\r\n", b"G")]
    return await _all(one(*kind) for kind in kinds for _ in range(25))


# ---- how they send


@contextlib.asynccontextmanager
async def _connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Left without a word."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def _all(sending: Iterable[Awaitable[int]]) -> int:
    return sum(await asyncio.gather(*sending))


async def _ask(port: int, request: bytes) -> int:
    """Wait for the answer, but not for long."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(_PATIENCE_S), _connected(port) as (reader, writer):
            writer.write(request.replace(b"HTTP/1.1\r\n", b"HTTP/1.1\r\nConnection: close\r\n", 1))
            while await reader.read(65536):
                continue
    return len(request)


async def _flood(port: int, pieces: Iterable[bytes]) -> int:
    """Send as long as it is taken, read nothing, stay for a moment."""
    sent = 0
    with contextlib.suppress(OSError, TimeoutError):
        async with _connected(port) as (_, writer):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SEND_S):
                    for piece in pieces:
                        writer.write(piece)
                        await writer.drain()
                        sent += len(piece)
            await asyncio.sleep(0.5)
    return sent


# ---- the lying replica

_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_TOKEN = {"index": 0, "text": " a", "token_ids": [7], "finish_reason": None}


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _event(**fields: object) -> bytes:
    told = {"id": "x", "object": "text_completion", "created": 1, "model": SERVED, "choices": [_TOKEN], **fields}
    return _chunk(b"data: " + json.dumps(told).encode() + b"\n\n")


class Liar:
    """Says that it is well; the prompt chooses how it lies."""

    sent = 0
    ways = ("comments", "events", "trailers", "headers", "numbers", "stall", "page")

    @classmethod
    @contextlib.asynccontextmanager
    async def listening(cls) -> AsyncIterator[int]:
        """Its port."""
        server = await asyncio.start_server(cls._serve, "127.0.0.1", 0)
        async with server:
            yield server.sockets[0].getsockname()[1]

    @classmethod
    async def _serve(cls, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_over = (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError)
        with contextlib.suppress(*is_over):
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(
                    (line[15:] for line in head.lower().split(b"\r\n") if line[:15] == b"content-length:"), b"0"
                )
                body = await reader.readexactly(int(length))
                if not head.startswith(b"POST"):
                    told = b'{"status":"ok","engine_restarts":0}'
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(told), told))
                    continue
                for piece in cls._lies(str(json.loads(body)["prompt"])):
                    writer.write(piece)
                    await writer.drain()
                    cls.sent += len(piece)
                await asyncio.sleep(_PATIENCE_S)
        writer.transport.abort()

    @staticmethod
    def _lies(way: str) -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\n" if way == "headers" else _STREAM
        many = 4 * _MIB // 60_000
        if way == "comments":
            yield from [_chunk(b": x\n\n" * 12_000)] * many
        elif way == "events":
            yield from [_event(choices=[]) * 500] * many
        elif way == "trailers":
            yield from [_event(), b"0\r\n", *[b"a: b\r\n" * 10_000] * many]
        elif way == "headers":
            yield from [b"a: b\r\n" * 10_000] * many
        elif way == "numbers":
            yield _event(choices=[{**_TOKEN, "token_ids": [2**64]}], usage={"prompt_tokens": 2**63})
        elif way == "stall":
            yield _event()
        else:
            yield _chunk(b"<html>It works!</html>" * 100)
