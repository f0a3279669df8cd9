"""Answers that are large, have many parts, or say impossible figures: others go on, and nobody pays too much."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import pytest
from byte_replica import answer
from gateways_for_tests import RunningGateway, running_gateway
from test_charging import replica, story_of
from test_replica_answers import CALM, CHAT, STOP, chunk, log, says, serving, stream, whole

from powerband.gateway.proxy import relay as relaying
from powerband.gateway.proxy.relay import Relay
from powerband.gateway.upstream.buffered_response import MAX_RESPONSE_BYTES, BudgetShare, ResponseBudget
from powerband.gateway.upstream.failure import UpstreamFailure
from powerband.openai.chunks import read_chunk
from powerband.openai.events import MAX_EVENT_BYTES

UNLIMITED = {name: value for name, value in CHAT.items() if name != "max_tokens"}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), *CALM) as running:
        yield running
        assert "Traceback" not in log(running)


def test_a_large_whole_answer_comes_through_under_the_served_name(gateway: RunningGateway) -> None:
    said = whole(logprobs=[{"token": "ä", "logprob": -0.5}] * 100_000)
    with serving(gateway, says(answer(said))):
        told = gateway.post("/v1/chat/completions", UNLIMITED)
    assert told.json() == {**json.loads(said), "model": told.json()["model"]}
    assert told.json()["model"].startswith("public")
    assert gateway.records()[-1]["record"]["output_tokens"] == 1


def test_what_is_too_large_is_run_once_and_counts_against_no_replica(gateway: RunningGateway) -> None:
    event = chunk({"content": "a" * (MAX_EVENT_BYTES + (1 << 20))})
    for said, is_stream in ((answer(whole(x="y" * MAX_RESPONSE_BYTES)), False), (stream([event]), True)):
        with serving(gateway, says(said), says(said)) as replicas:
            for number in range(1, 6):
                told = gateway.post("/v1/chat/completions", {**UNLIMITED, "stream": is_stream})
                assert (told.status_code, told.json()["error"]["code"]) == (502, "answer_too_large")
                assert sum(len(one.posts) for one in replicas) == number
            assert set(gateway.replica_states().values()) == {"ready"}


def test_a_right_response_is_passed_on_however_large_it_is_for_its_tokens(gateway: RunningGateway) -> None:
    """SGLang's hidden states, vLLM's routed experts, audio in a message: megabytes for a few tokens."""
    choice = {**json.loads(whole())["choices"][0], "hidden_states": [[-0.0123456789] * 4096] * 100}
    for said, asked in (
        (whole(choices=[choice]), {"return_hidden_states": True}),
        (whole(audio={"data": "A" * (5 << 20)}), {}),
    ):
        with serving(gateway, says(answer(said))) as (replica,):
            told = gateway.post("/v1/chat/completions", {**CHAT, **asked})
            assert (told.status_code, len(replica.posts)) == (200, 1)
            assert len(told.content) > 5 << 20


def test_a_response_that_the_gateway_cannot_buffer_is_the_replicas_fault_only_if_no_right_one_is_as_large(
    gateway: RunningGateway,
) -> None:
    lie = answer(whole(x="y" * MAX_RESPONSE_BYTES))
    with serving(gateway, says(lie), says(lie)) as replicas:
        told = gateway.post("/v1/chat/completions", {**CHAT, "return_hidden_states": True})
        assert (told.status_code, told.json()["error"]["code"]) == (502, "answer_too_large")
        assert sum(len(one.posts) for one in replicas) == 1
    with serving(gateway, says(lie), says(answer(whole()))):
        assert [gateway.post("/v1/chat/completions", CHAT).status_code for _ in range(8)] == [200] * 8
        assert sorted(gateway.replica_states().values()) == ["open", "ready"]


def test_a_response_with_much_beside_its_choices_is_too_large_and_counts_against_no_replica(
    gateway: RunningGateway,
) -> None:
    said = answer(whole(embeddings=[[0.0123456789] * 4096] * 100))
    with serving(gateway, says(said), says(said)) as replicas:
        for number in range(1, 6):
            told = gateway.post("/v1/chat/completions", UNLIMITED)
            assert (told.status_code, told.json()["error"]["code"]) == (502, "answer_too_large")
            assert sum(len(one.posts) for one in replicas) == number
        assert set(gateway.replica_states().values()) == {"ready"}


def test_a_large_token_look_up_is_answered_and_a_larger_one_asked_for_once(gateway: RunningGateway) -> None:
    for size, status in ((1 << 20, 200), (MAX_RESPONSE_BYTES // 5, 502)):
        said = answer(b'{"count":7,"tokens":[%b]}' % b",".join([b"12345"] * size))
        with serving(gateway, says(said), says(said)) as replicas:
            told = gateway.post("/tokenize", {"prompt": "a", "model": "public"})
            assert told.status_code == status
            assert sum(len(one.posts) for one in replicas) == 1


class Exchange:
    """Hands on one piece. The rest of an upstream's exchange."""

    idle_s = 1.0

    def __init__(self, piece: bytes) -> None:
        self._pieces = [piece]
        self.headers: list[tuple[bytes, bytes]] = []

    async def read(self) -> bytes:
        return self._pieces.pop() if self._pieces else b""

    async def stream_to(self, take: Callable[[bytes], bool]) -> None:
        while self._pieces and take(self._pieces.pop()):
            pass

    def no_progress(self) -> None:
        pass

    def hold(self) -> None:
        pass

    def release(self) -> None:
        pass


class Trip:
    """Takes note of nothing."""

    def progress(self) -> None:
        pass

    def first_token(self, prompt_tokens: int | None) -> None:
        pass


class Line:
    is_behind = False

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.is_aborted = False

    @property
    def unread_bytes(self) -> int:
        return sum(map(len, self.written))

    def abort(self) -> None:
        self.is_aborted = True

    def write_chunk(self, data: bytes) -> None:
        self.written.append(data)

    def when_writable(self, call: Callable[[], None]) -> None:
        assert self.is_behind


async def no_others(_: int) -> None:
    """It is its turn."""


def relay_of(state: Any, piece: bytes, buffered: BudgetShare, turn: Callable[[int], Any] = no_others) -> Any:
    return Relay(Trip(), state, Exchange(piece), lambda _: None, turn, buffered)  # type: ignore[arg-type]


@pytest.mark.parametrize("is_behind", [False, True])
def test_events_that_come_at_once_are_told_in_turns(is_behind: bool) -> None:
    """Whatever the client has read of them: they are in memory already."""
    piece = stream([*[chunk({"content": " a"})] * 5000, STOP], head=b"")
    state, line, turns = story_of("openai", n=1), Line(), 0
    line.is_behind = is_behind

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def relay() -> None:
        others = asyncio.create_task(count_turns())
        told = relay_of(state, piece, BudgetShare(ResponseBudget(), "a"))
        line.write_chunk(await told.read_first_events())
        await told.forward(line)
        others.cancel()

    asyncio.run(relay())
    assert b"".join(line.written).count(b"data: ") == 5001
    assert turns >= 5000 // relaying._EVENTS_OF_A_TURN


def test_a_large_event_waits_for_its_turn() -> None:
    """Beside those of other streams, of which each takes up to 80 ms."""
    large = chunk({"content": " a"}) | {"more": "x" * (200 << 10)}
    sizes: list[int] = []

    async def turn(num_bytes: int) -> None:
        sizes.append(num_bytes)

    async def relay() -> None:
        line = Line()
        told = relay_of(story_of(n=1), stream([large, STOP], head=b""), BudgetShare(ResponseBudget(), "a"), turn)
        line.write_chunk(await told.read_first_events())
        await told.forward(line)

    asyncio.run(relay())
    assert max(sizes) > 200 << 10


@pytest.mark.parametrize("max_bytes", [1 << 20, 64 << 10])
def test_what_clients_do_not_read_of_their_streams_is_bounded_together(max_bytes: int) -> None:
    """One that would hold too much is closed; an error would wait behind what it does not read."""
    budget, line = ResponseBudget(max_bytes), Line()
    large = chunk({"content": " a"}) | {"more": "x" * (200 << 10)}
    line.is_behind = True

    async def relay() -> None:
        unfinished = stream([large, large], head=b"", done=False)
        told = relay_of(story_of(n=1), unfinished, BudgetShare(budget, "a"))
        line.write_chunk(await told.read_first_events())
        with pytest.raises(UpstreamFailure, match="ended before"):
            await told.forward(line)

    asyncio.run(relay())
    assert line.is_aborted == (max_bytes < 200 << 10)
    assert budget.held["a"] > 200 << 10


def test_more_choices_than_were_asked_for_are_refused_before_they_are_read_one_by_one() -> None:
    with pytest.raises(UpstreamFailure, match="70000 choices at once; 1 were requested"):
        story_of().process_event(msgspec.json.encode({"choices": [{}] * 70_000}), time.monotonic())


@pytest.mark.parametrize("tokens", [2**40, 10**6])
def test_usage_that_no_request_can_have_is_not_charged(tokens: int) -> None:
    state = story_of(max_tokens=5)
    usage = {"prompt_tokens": tokens, "completion_tokens": tokens}
    body = {"choices": [{"index": 0, "text": "a"}], "usage": usage}
    state.process_whole(read_chunk(msgspec.json.encode(body)), replica("vllm"))
    prompt, _, output = state.tokens.final_usage()
    assert output == 5
    assert prompt < 100_000
    assert state.tokens.is_estimate


def test_a_prompt_count_that_no_request_can_have_does_not_use_up_a_limit_while_the_stream_runs(
    gateway: RunningGateway,
) -> None:
    """The reservation grows to what can be charged in the end, about 65,000 tokens, not to what the replica says."""
    key = gateway.admin.post("/admin/keys", json={"name": "app", "limits": {"tokens_per_min": 1_000_000}}).json()
    may_end = threading.Event()

    async def play(writer: asyncio.StreamWriter, _: dict[str, Any]) -> None:
        usage = {"prompt_tokens": 2**40 - 1, "completion_tokens": 1}
        first = stream([{**chunk({"content": "a"}), "usage": usage}], done=False).removesuffix(b"0\r\n\r\n")
        writer.write(first)
        await writer.drain()
        while not may_end.is_set():
            await asyncio.sleep(0.01)
        writer.close()

    def used() -> int:
        return int(gateway.admin.get(f"/admin/keys/{key['id']}").json()["used"]["tokens_last_min"])

    with (
        serving(gateway, play),
        httpx.stream(
            "POST",
            f"{gateway.url}/v1/chat/completions",
            json={**CHAT, "stream": True},
            headers={"Authorization": f"Bearer {key['secret']}"},
        ) as told,
    ):
        assert next(told.iter_lines())  # the usage came with it
        assert 60_000 < used() < 100_000
        may_end.set()


def test_an_impossible_count_of_tokens_is_charged_as_what_was_sent(gateway: RunningGateway) -> None:
    with serving(gateway, says(answer(json.dumps({"count": 2**63 - 1, "tokens": [1]})))):
        assert gateway.post("/tokenize", {"prompt": "a", "model": "public"}).status_code == 200
        assert gateway.post("/tokenize", {"prompt": "a", "model": "public"}).status_code == 200
    assert gateway.admin.get("/admin/usage").status_code == 200
