"""What is said of a body that is wrong: the field, the value, and never all of what was sent."""

from __future__ import annotations

import asyncio
import contextlib
import time
import tracemalloc
from typing import Any

import pytest
from starlette.requests import Request

from powerband.errors import InvalidRequest
from powerband.server.protocol import ChatRequest, CompletionRequest
from powerband.web.body import _num_commas, decode, read_body
from powerband.web.errors import HttpError
from powerband.web.http1.framing import ChunkedFraming


def complaint(data: bytes, kind: type = CompletionRequest) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        decode(data, kind)
    return caught.value


@pytest.mark.parametrize("name", ["k", " - at `$.model`", "` - at `$", "a`b"])
def test_a_long_unknown_name_is_cut(name: str) -> None:
    problem = complaint(b'{"model":"m","prompt":"a","%b":1}' % (name.encode() * 100_000))
    assert problem.code == "unknown_parameter"
    assert problem.message.startswith(f"Unknown field '{name}")
    assert len(problem.message) < 200


def test_the_place_of_what_is_wrong_is_found_behind_any_text() -> None:
    role = complaint(b'{"model":"m","messages":[{"role":" - at `$.x`","content":"a"}]}', ChatRequest)
    assert role.param == "messages.0.role"
    bias = complaint(b'{"model":"m","prompt":"a","logit_bias":{"a - at `$.b`":1}}')
    assert bias.param == "logit_bias"
    assert complaint(b'{"model":"m","prompt":"a","stop":["b",1]}').param == "stop.1"
    nested = complaint(b'{"model":"m","prompt":"a","stream_options":{"include_usag":true}}')
    assert (nested.param, nested.hint) == ("stream_options.include_usag", "Did you mean 'include_usage'?")


def cpu_s(data: bytes) -> float:
    def once() -> float:
        start_s = time.process_time()
        with contextlib.suppress(InvalidRequest):
            decode(data, CompletionRequest)
        return time.process_time() - start_s

    return min(once() for _ in range(3))


def test_a_complaint_takes_about_as_long_as_what_is_right() -> None:
    text = b" - at `$" * (1 << 18)
    right = cpu_s(b'{"model":"m","prompt":"%b"}' % text)
    assert cpu_s(b'{"model":"m","prompt":"a","%b":1}' % text) < 6 * right


def test_a_body_of_tiny_chunks_is_refused_before_long() -> None:
    small = ChunkedFraming()
    assert read_all(small, b"1\r\na\r\n" * 4_000 + b"0\r\n\r\n") == b"a" * 4_000
    with pytest.raises(HttpError, match="more of framing than of content"):
        read_all(ChunkedFraming(), b"10000\r\n" + b"a" * 65536 + b"\r\n" + b"1\r\na\r\n" * 5_000)
    fair = b"10\r\n" + b"a" * 16 + b"\r\n"
    assert len(read_all(ChunkedFraming(), fair * 100_000)) == 1_600_000


def read_all(framing: ChunkedFraming, data: bytes) -> bytes:
    left, content = bytearray(data), bytearray()
    while True:
        content += framing.take(left)
        if not framing.has_more:
            return bytes(content)


def test_a_body_in_tiny_pieces_takes_little_more_memory_than_its_size() -> None:
    num_pieces = 100_000

    async def receive() -> dict[str, Any]:
        nonlocal num_pieces
        num_pieces -= 1
        return {"type": "http.request", "body": b"%02d" % (num_pieces % 100), "more_body": num_pieces > 0}

    tracemalloc.start()
    try:
        body = asyncio.run(read_body(Request({"type": "http", "headers": []}, receive), 1 << 20))
        assert tracemalloc.get_traced_memory()[1] < 10 * len(body)
    finally:
        tracemalloc.stop()


def test_only_commas_outside_of_strings_count_as_values() -> None:
    assert _num_commas(b'{"a,b":[1,2,"x,y\\",z"],"c":"\\\\","d":3}') == 4


def test_a_body_of_a_million_numbers_is_not_decoded_a_second_time() -> None:
    def amend(body: dict[str, Any]) -> dict[str, Any]:
        raise AssertionError("it was decoded")

    numbers = b"[" + b"1," * 1_000_000 + b"1]"
    with pytest.raises(InvalidRequest, match="Unknown field 'k'"):
        decode(b'{"model":"m","prompt":"a","k":%b}' % numbers, CompletionRequest, amend)
