"""Whole answers of any size: what is read of them, against the standard library's JSON, and what is passed on."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerband.gateway.upstream import buffered_response
from powerband.gateway.upstream.buffered_response import (
    LARGE_BYTES,
    BufferedResponse,
    ResponseBudget,
    ResponseBudgetExceeded,
    ResponseScanner,
)
from powerband.gateway.upstream.failure import UpstreamFailure
from powerband.openai.events import EventReader

SCALARS = st.none() | st.booleans() | st.integers(-9, 10**9) | st.floats(-1e9, 1e9) | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner), max_leaves=8
)
CHOICES = st.fixed_dictionaries(
    {"index": st.integers(0, 9), "finish_reason": st.sampled_from([None, "stop", "length"])},
    optional={
        "text": st.text(max_size=60),
        "message": st.fixed_dictionaries({"content": st.text()}),
        "logprobs": VALUES,
    },
)
ANSWERS = st.fixed_dictionaries(
    {"choices": st.lists(CHOICES, max_size=4)},
    optional={
        "model": st.sampled_from(["inner", 'a "quoted" name', "名"]),
        "usage": st.fixed_dictionaries({"completion_tokens": st.integers(0, 2**40)}),
        "id": st.text(),
        "prompt_logprobs": VALUES,
    },
)


def in_pieces(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


@given(answer=ANSWERS, size=st.integers(1, 40), indent=st.sampled_from([None, 1]), is_ascii=st.booleans())
def test_a_large_answer_is_read_as_a_small_one_and_renamed_in_place(
    answer: dict[str, Any], size: int, indent: int | None, is_ascii: bool
) -> None:
    data = json.dumps(answer, indent=indent, ensure_ascii=is_ascii).encode(errors="replace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffered_response, "LARGE_BYTES", 0)
        patch.setattr(buffered_response, "_SLICE_BYTES", 16)
        read = BufferedResponse()
        for piece in in_pieces(data, size):
            read.add(piece)
        chunk = read.read()
        assert b"".join(read.pieces()) == data
        renamed = json.loads(b"".join(read.renamed("served")))
    assert [(choice.index, choice.finish_reason) for choice in chunk.choices or ()] == [
        (choice["index"], choice["finish_reason"]) for choice in answer["choices"]
    ]
    assert (chunk.usage and chunk.usage.completion_tokens) == answer.get("usage", {}).get("completion_tokens")
    assert renamed == {**json.loads(data), "model": "served"}


def read_in_pieces(data: bytes) -> BufferedResponse:
    answer = BufferedResponse()
    for piece in in_pieces(data, 256 << 10):
        answer.add(piece)
    answer.read()
    return answer


def large(**more: Any) -> bytes:
    choice = {"index": 0, "text": "é" * (2 << 20), "finish_reason": "stop", "token_ids": [1] * (1 << 20), **more}
    usage = {"prompt_tokens": 3, "completion_tokens": 70000}
    return json.dumps({"id": "a", "model": "inner", "choices": [choice], "usage": usage}, ensure_ascii=False).encode()


def test_of_a_large_answer_little_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def read_chunk(data: bytes, *, is_surface: bool = False) -> Any:
        decoded.append(len(data))
        return msgspec.json.decode(data)

    monkeypatch.setattr(buffered_response, "read_chunk", read_chunk)
    assert read_in_pieces(large()).is_large
    assert decoded[0] < 1000


@pytest.mark.parametrize(
    "data",
    [
        large()[:-1],
        large() + b"}",
        large().replace("é".encode(), b"\xe9", 1),
        b"<html>" + large(),
        large()[:-1] + b',"x":{"y":[}}}',
    ],
    ids=["cut", "more", "no UTF-8", "HTML", "brackets"],
)
def test_a_large_answer_that_is_no_json_is_the_replicas_fault(data: bytes) -> None:
    with pytest.raises(UpstreamFailure, match="not what was asked for"):
        read_in_pieces(data)


def test_answers_that_wait_for_their_clients_are_bounded_together_and_by_tenant() -> None:
    budget = ResponseBudget(8 * LARGE_BYTES)
    budget.add("a", 4 * LARGE_BYTES, 4 * LARGE_BYTES)
    with pytest.raises(ResponseBudgetExceeded, match="of one client"):
        budget.add("a", 2 * LARGE_BYTES, 2 * LARGE_BYTES)
    budget.add("a", 100, 100)  # a small one
    budget.release("a", 2 * LARGE_BYTES)
    budget.add("b", 3 * LARGE_BYTES, 3 * LARGE_BYTES)
    with pytest.raises(ResponseBudgetExceeded):
        budget.add("c", 2 * LARGE_BYTES, 2 * LARGE_BYTES)
    for tenant, size in (("a", 4 * LARGE_BYTES + 100), ("b", 3 * LARGE_BYTES), ("c", 2 * LARGE_BYTES)):
        budget.release(tenant, size)
    assert not budget.held


def test_of_many_large_answers_one_piece_is_scanned_in_a_turn_of_the_loop() -> None:
    piece, scanned = b"x" * 4096, 0

    class Counted(BufferedResponse):
        def add(self, piece: bytes) -> None:
            nonlocal scanned
            scanned += self.is_large
            super().add(piece)

    async def receive(turns: ResponseScanner) -> None:
        answer = Counted()
        answer.add(b"{" + b" " * LARGE_BYTES)
        for _ in range(20):
            await turns.add(answer, piece, "a")

    async def test() -> None:
        turns, most = ResponseScanner(), 0
        receiving = [asyncio.create_task(receive(turns)) for _ in range(24)]
        while not all(task.done() for task in receiving):
            before = scanned
            await asyncio.sleep(0)
            most = max(most, scanned - before)
        await asyncio.gather(*receiving)
        assert (scanned, most) == (24 * 20, 1)

    asyncio.run(test())


def test_tenants_take_turns_however_many_large_answers_each_has() -> None:
    order: list[str] = []

    class Noted(BufferedResponse):
        def __init__(self, tenant: str) -> None:
            super().__init__()
            self.tenant = tenant

        def add(self, piece: bytes) -> None:
            if self.is_large:
                order.append(self.tenant)
            super().add(piece)

    async def receive(turns: ResponseScanner, tenant: str) -> None:
        answer = Noted(tenant)
        answer.add(b"{" + b" " * LARGE_BYTES)
        for _ in range(10):
            await turns.add(answer, b" " * 4096, tenant)

    async def test() -> None:
        turns = ResponseScanner()
        receiving = [asyncio.create_task(receive(turns, tenant)) for tenant in ["a"] * 30 + ["b"]]
        await asyncio.sleep(0)
        receiving[0].cancel()  # while it has its turn
        receiving[1].cancel()  # while it waits
        await asyncio.gather(*receiving, return_exceptions=True)

    asyncio.run(test())
    assert order.count("b") == 10
    assert len(order) == 28 * 10 + 1 + 10
    assert max(place for place, tenant in enumerate(order) if tenant == "b") <= 3 * 10


@pytest.mark.parametrize("kind", ["response", "event"])
def test_what_a_replica_sends_in_tiny_pieces_takes_little_more_memory_than_its_size(kind: str) -> None:
    num_pieces = 100_000
    response, reader = BufferedResponse(), EventReader()
    tracemalloc.start()
    try:
        for number in range(num_pieces):
            piece = b"%02d" % (number % 100)
            response.add(piece) if kind == "response" else reader.feed(piece)
        assert tracemalloc.get_traced_memory()[1] < 5 * 2 * num_pieces
    finally:
        tracemalloc.stop()
    assert len(response.surface()) == (2 * num_pieces if kind == "response" else 0)
