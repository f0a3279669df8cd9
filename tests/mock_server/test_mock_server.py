"""The scripted server does what its script says, and what it tells about itself is so."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from loads_for_tests import best_of_five
from powerband.bench.client.http import get, post
from powerband.bench.client.messages import Endpoint, RequestMessage, SegmentMessage, ServerAddress
from powerband.bench.client.probe import calibrate_prompt_words, find_server
from powerband.bench.client.prompts import ConversationPrompts, PromptMaker, request_bytes
from powerband.bench.client.responses import ParsedResponse, parse_response
from powerband.engines.metrics import parse_metrics
from powerband.errors import UsageError
from powerband.http_client.connection import CollectedResponse, ConnectionPool
from powerband.http_client.request import Response
from powerband.mock_server.behavior import Behavior, words
from powerband.mock_server.process import mock_server_process
from powerband.mock_server.server import MockServer

T = TypeVar("T")


def with_server(script: Behavior, act: Callable[[MockServer, ServerAddress], Awaitable[T]]) -> T:
    """In one event loop: for scripts without a stall."""

    async def run() -> T:
        server = MockServer(script)
        try:
            base = await server.start()
            return await act(server, ServerAddress(base=base, endpoint="completions", model="scripted"))
        finally:
            server.close()

    return asyncio.run(run())


async def ask(target: ServerAddress, tokens: int, key: str = "a") -> ParsedResponse:
    """One streamed request on a connection of its own."""
    body = ConversationPrompts(target, PromptMaker()).body(RequestMessage(0, (SegmentMessage(key, 5),), tokens, 0, 0.0))
    connections = ConnectionPool(target.base)
    connection, _ = await connections.take()
    answer = CollectedResponse()
    await connection.exchange((request_bytes(target, body),), answer)
    connection.abort()
    return parse_response(answer)


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@pytest.mark.parametrize("script", [Behavior(), Behavior(ttft_s=0.01, tpot_s=0.002), Behavior(tokens_per_chunk=3)])
def test_an_answer_has_the_tokens_that_were_asked_for(endpoint: Endpoint, script: Behavior) -> None:
    async def act(_: MockServer, target: ServerAddress) -> ParsedResponse:
        return await ask(ServerAddress(base=target.base, endpoint=endpoint, model="scripted"), 7)

    reading = with_server(script, act)
    assert (reading.problem, reading.text, reading.finish_reason) == ("", words(0, 7), "length")
    assert (reading.output_tokens, sum(reading.tokens), reading.prompt_tokens) == (7, 7, 5)
    assert reading.tokens == ([3, 3, 1] if script.tokens_per_chunk == 3 else [1] * 7)


def test_the_probe_finds_it_and_knows_its_words() -> None:
    async def act(_: MockServer, target: ServerAddress) -> tuple[ServerAddress, int | None]:
        found, server = await find_server(ServerAddress(base=target.base, endpoint="completions", model=""))
        return await calibrate_prompt_words(found), server.max_model_len

    target, length = with_server(Behavior(max_model_len=4096), act)
    assert (target.model, length) == ("scripted", 4096)
    assert target.words_per_token == pytest.approx(1.0)


def test_it_keeps_the_truth_of_each_request() -> None:
    async def act(server: MockServer, target: ServerAddress) -> None:
        await asyncio.gather(*(ask(target, 4, key=str(i)) for i in range(3)))
        assert [record.number for record in server.records] == [0, 1, 2]
        for record in server.records:
            assert record.ended_s is not None
            assert record.status == 200
            assert record.tokens == len(record.written_s) == 4
            assert record.written_s[0] - record.arrived_s >= 0.02
            assert record.ended_s >= record.written_s[-1]
        assert len({record.digest for record in server.records}) == 3

    with_server(Behavior(ttft_s=0.02, tpot_s=0.005), act)


@best_of_five
def test_deadlines_do_not_drift() -> None:
    """Of 200 tokens each may be late, but the last one not by the sum."""

    async def act(server: MockServer, target: ServerAddress) -> None:
        await ask(target, 200)
        record = server.records[0]
        late_s = [written - record.arrived_s - server.script.due_s(i) for i, written in enumerate(record.written_s)]
        assert min(late_s) > -1e-4
        assert sorted(late_s)[100] < 0.002

    with_server(Behavior(ttft_s=0.002, tpot_s=0.002), act)


def test_slots_are_given_in_the_order_of_arrival() -> None:
    async def act(server: MockServer, target: ServerAddress) -> None:
        await asyncio.gather(*(ask(target, 3, key=str(i)) for i in range(6)))
        begun = [record.begun_s or 0.0 for record in server.records]
        assert begun == sorted(begun)
        for first, third in zip(server.records, server.records[2:], strict=False):
            assert first.ended_s is not None
            assert third.begun_s is not None
            assert third.begun_s >= first.ended_s

    with_server(Behavior(ttft_s=0.01, tpot_s=0.002, slots=2), act)


def test_errors_and_refusals_come_as_scripted() -> None:
    async def act(server: MockServer, target: ServerAddress) -> list[int]:
        held = asyncio.gather(*(ask(target, 3, key=str(i)) for i in range(2)))
        while len(server.records) < 2:
            await asyncio.sleep(0.001)
        refused = await post(target, "/v1/completions", {"prompt": "x"})
        assert b"Scripted to refuse" in refused.body
        await held
        failed = await post(target, "/v1/completions", {"prompt": "x", "max_tokens": 1})
        return [refused.status, failed.status]

    assert with_server(Behavior(ttft_s=1.0, max_in_flight=2, fail_every=4), act) == [429, 500]


def test_a_client_that_leaves_frees_its_slot_unless_a_fault_is_planted() -> None:
    async def leave_and_ask(server: MockServer, target: ServerAddress) -> str:
        connections = ConnectionPool(target.base)
        connection, _is_kept = await connections.take()
        body = ConversationPrompts(target, PromptMaker()).body(
            RequestMessage(0, (SegmentMessage("gone", 5),), 1000, 0, 0.0)
        )
        connection.send((request_bytes(target, body),), CollectedResponse())
        while not server.records:
            await asyncio.sleep(0.001)
        connection.abort()
        try:
            async with asyncio.timeout(0.5 if server.script.leaks_slots else 60.0):
                return (await ask(target, 2)).problem
        except TimeoutError:
            return "hangs"

    assert with_server(Behavior(tpot_s=0.01, slots=1), leave_and_ask) == ""
    assert with_server(Behavior(tpot_s=0.01, slots=1, leaks_slots=True), leave_and_ask) == "hangs"


@pytest.mark.parametrize("script", [Behavior(), Behavior(tpot_s=0.001)])
def test_it_goes_on_with_an_output_that_another_server_began(script: Behavior) -> None:
    body = {"prompt": "a b", "max_tokens": 6, "stream": True, "return_token_ids": True}

    async def act(_: MockServer, target: ServerAddress) -> tuple[bytes, bytes]:
        whole = await post(target, "/v1/completions", body)
        return whole.body, (await post(target, "/v1/completions", {**body, "resume_token_ids": [0, 1, 2, 3]})).body

    whole, rest = with_server(script, act)
    assert [n for n in range(6) if b'"token_ids":[%d]' % n in whole] == list(range(6))
    assert [n for n in range(6) if b'"token_ids":[%d]' % n in rest] == [4, 5]
    assert [n for n in range(6) if b'"text":"%b"' % words(n, n + 1).encode() in rest] == [4, 5]


def test_its_metrics_are_understood() -> None:
    async def act(_: MockServer, target: ServerAddress) -> dict[str, float]:
        await ask(target, 4)
        return parse_metrics((await get(target, "/metrics")).body)

    figures = with_server(Behavior(ttft_s=0.02), act)
    assert (figures["running"], figures["waiting"], figures["output_tokens"]) == (0, 0, 4)
    assert 0.02 <= figures["ttft_sum"] < 0.1
    assert figures["ttft_count"] == 1


@pytest.mark.parametrize(
    "body", [[], {}, {"prompt": 1}, {"prompt": "x", "max_tokens": 0}, {"prompt": "x", "model": "other"}]
)
def test_a_wrong_body_is_refused(body: object) -> None:
    async def act(_: MockServer, target: ServerAddress) -> Response:
        return await post(target, "/v1/completions", body)

    assert with_server(Behavior(), act).status == 400


def test_a_process_of_its_own_says_its_address_and_forgets_when_told() -> None:
    async def run() -> list[int]:
        async with mock_server_process(Behavior(ttft_s=0.01)) as server:
            await ask(server.target, 2)
            counts = [len(await server.records())]
            await server.forget()
            return [*counts, len(await server.records())]

    assert asyncio.run(run()) == [1, 0]


def test_a_wrong_script_is_named() -> None:
    with pytest.raises(UsageError, match="A script has no speed"):
        Behavior.from_json('{"speed": 1}')
    with pytest.raises(UsageError, match="ttft_s is -1"):
        Behavior.from_json('{"ttft_s": -1}')
    with pytest.raises(UsageError, match="This is not a valid behavior"):
        Behavior.from_json("[]")
    command = [sys.executable, "-m", "powerband.mock_server.server", "--script", '{"speed": 1}']
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
