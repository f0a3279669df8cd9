"""Questions at a steady rate, each on a connection of its own, and each answer read and kept."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from powerband.bench.client.messages import ServerAddress
from powerband.bench.client.responses import ParsedResponse, parse_response
from powerband.http_client.connection import CollectedResponse, ConnectionPool, OutboundConnection, request_head
from powerband.http_client.request import Response

SERVED = "demo"


@dataclass(frozen=True)
class Question:
    """A greedy completion. Its answer is always the same."""

    prompt: str
    tokens: int
    deadline_s: float | None = None  # to the first token

    @property
    def body(self) -> bytes:
        told = {"model": SERVED, "prompt": self.prompt, "max_tokens": self.tokens, "temperature": 0, "stream": True}
        more = {} if self.deadline_s is None else {"deadline_s": self.deadline_s}
        return json.dumps(told | more | {"ignore_eos": True, "stream_options": {"include_usage": True}}).encode()


def questions(count: int = 8, tokens: int = 64) -> list[Question]:
    begins = ("The river", "A small house", "Tomorrow the", "She said", "In the year", "The old engine", "Rain", "Two")
    return [Question(f"{begins[n % len(begins)]} {'and then ' * (n % 5)}number {n}", tokens) for n in range(count)]


@dataclass
class Told:
    """How one request went. Seconds on the monotonic clock."""

    question: Question
    sent_s: float
    status: int = 0
    code: str = ""  # of an error
    answer: CollectedResponse = field(default_factory=CollectedResponse)
    reading: ParsedResponse = field(default_factory=ParsedResponse)
    ended_s: float = 0.0

    @property
    def is_streaming(self) -> bool:
        """A token has arrived, and more are to come."""
        return bool(self.answer.pieces) and not self.ended_s

    @property
    def failed(self) -> bool:
        return bool(self.reading.problem)

    @property
    def ttft_s(self) -> float:
        return self.reading.times_s[0] - self.sent_s if self.reading.times_s else float("inf")

    @property
    def stall_s(self) -> float:
        """The longest time without a token."""
        times = [self.sent_s, *self.reading.times_s]
        return max((after - before for before, after in itertools.pairwise(times)), default=0.0)


class Load:
    """Requests at a steady rate for as long as the block lasts; then all of them have ended.

    async with Load(target, questions(), rate=20) as load:
        ...
    load.told, load.failed, load.wrong(answers)
    """

    def __init__(self, target: ServerAddress, asked: Sequence[Question], rate: float, timeout_s: float = 60.0) -> None:
        self._target, self._asked, self._rate, self._timeout_s = target, asked, rate, timeout_s
        self.told: list[Told] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Load:
        self._sending = asyncio.create_task(self._send_all())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._sending.cancel()
        await asyncio.gather(self._sending, return_exceptions=True)
        await asyncio.gather(*self._tasks)

    async def _send_all(self) -> None:
        start_s, number = time.monotonic(), 0
        while True:
            await asyncio.sleep(max(0.0, start_s + number / self._rate - time.monotonic()))
            told = Told(self._asked[number % len(self._asked)], time.monotonic())
            self.told.append(told)
            task = asyncio.create_task(self._one(told))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            number += 1

    async def _one(self, told: Told) -> None:
        try:
            async with connected(self._target) as connection, asyncio.timeout(self._timeout_s):
                asked = request(self._target, self._target.path, told.question.body)
                await connection.exchange((asked,), told.answer)
        except (OSError, TimeoutError) as problem:
            told.answer.problem = told.answer.problem or f"{type(problem).__name__}: {problem}"
        answer = told.answer
        told.ended_s, told.status = time.monotonic(), answer.status
        if answer.status >= 400:
            with contextlib.suppress(msgspec.MsgspecError, TypeError, KeyError):
                told.code = str(msgspec.json.decode(answer.body())["error"]["code"])
        told.reading = parse_response(answer)

    @property
    def failed(self) -> list[Told]:
        return [told for told in self.told if told.failed]

    def problems(self) -> list[str]:
        return sorted({told.reading.problem for told in self.failed})

    def wrong(self, answers: Mapping[str, str]) -> list[Told]:
        """Answers that are whole, and not what they should be."""
        return [told for told in self.told if not told.failed and told.reading.text != answers[told.question.prompt]]

    @property
    def running(self) -> int:
        return len(self._tasks)


async def answers_of(target: ServerAddress, asked: Sequence[Question]) -> dict[str, str]:
    """What an undisturbed service says, one question at a time."""
    found = {}
    for question in asked:
        async with connected(target) as connection, asyncio.timeout(60.0):
            answer = CollectedResponse()
            await connection.exchange((request(target, target.path, question.body),), answer)
        reading = parse_response(answer)
        assert not reading.problem, reading.problem
        assert reading.output_tokens == question.tokens
        found[question.prompt] = reading.text
    return found


async def put(target: ServerAddress, path: str, body: object) -> Response:
    """What powerband.bench.client.http has no verb for."""
    return await ask(target, "PUT", path, msgspec.json.encode(body))


async def ask(target: ServerAddress, method: str, path: str, body: bytes = b"", timeout_s: float = 10.0) -> Response:
    async with connected(target) as connection, asyncio.timeout(timeout_s):
        answer = CollectedResponse()
        await connection.exchange((request(target, path, body, method),), answer)
    return Response(answer.status, answer.body())


@contextlib.asynccontextmanager
async def connected(target: ServerAddress) -> AsyncIterator[OutboundConnection]:
    """A connection that nobody else uses."""
    connections = ConnectionPool(target.base)
    connection, _ = await connections.take()
    try:
        yield connection
    finally:
        connection.abort()


def request(target: ServerAddress, path: str, body: bytes, method: str = "POST") -> bytes:
    authority = target.base.partition("://")[2]
    return request_head(method, path, authority, len(body), target.headers) + body
