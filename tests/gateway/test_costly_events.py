"""Events of a replica that would be dear to read are refused for less than they would cost; right ones are not."""

from __future__ import annotations

import msgspec
import pytest

from powerband.openai import chunks
from powerband.openai.chunks import MAX_IDS, InvalidChunk, read_chunk
from powerband.openai.events import MAX_LINES, EventReader

FIELDS = b",".join(b'"%d":1' % number for number in range(100_000))
COSTLY = {
    "fields": b'{"choices":[{"text":"a"}],%b}' % FIELDS,
    "fields of a choice": b'{"choices":[{"text":"a",%b}]}' % FIELDS,
    "the same field": b'{"choices":[{"text":"a",%b}]}' % b",".join([b'"a":1'] * 100_000),
    "the same choices": b"{%b}" % b",".join([b'"choices":[{"text":"a"}]'] * 100_000),
    "fields of the usage": b'{"choices":[],"usage":{"prompt_tokens":1,%b}}' % FIELDS,
    "tokens": b'{"choices":[{"text":"a","token_ids":[%b]}]}' % b",".join([b"1"] * (MAX_IDS + 1)),
}


@pytest.mark.parametrize("kind", COSTLY)
def test_costly_chunks_are_refused_before_they_are_built(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_CHUNK", None)  # builds
    with pytest.raises(InvalidChunk, match=r"bytes in unknown fields|token_ids|brackets"):
        read_chunk(COSTLY[kind])


LOGPROB = {"token": " a", "logprob": -0.5, "bytes": [32, 97], "top_logprobs": [{"token": ",", "logprob": -1.5}]}
RIGHT = {
    "log-probabilities": {"choices": [{"delta": {"content": "a"}, "logprobs": {"content": [LOGPROB] * 20_000}}]},
    "log-probabilities of a prompt": {
        "choices": [{"text": "a", "prompt_logprobs": [{"12": {"logprob": -1.0, "rank": 1}}] * 50_000}]
    },
    "ids of a prompt": {"prompt_token_ids": [12345] * 600_000, "choices": [{"text": "a", "token_ids": [1]}]},
    "text like JSON": {"choices": [{"text": '{"a": 1, "b": 2}' * 100_000}]},
    "calls": {"choices": [{"delta": {"tool_calls": [{"function": {"arguments": '{"a":1}' * 20_000}}]}}]},
    "an unknown list": {"choices": [{"text": "a", "hidden_states": [0.5] * 500_000}]},
    "tokens": {"choices": [{"text": "a", "token_ids": [1] * MAX_IDS}]},
}


@pytest.mark.parametrize("kind", RIGHT)
def test_large_right_chunks_are_read(kind: str) -> None:
    chunk = read_chunk(msgspec.json.encode(RIGHT[kind]))
    assert chunk.choices is not None
    assert len(chunk.choices) == 1


@pytest.mark.parametrize("line", [b"x\n", b"data:\n", b"data: 1\n", b":\n", b"x\r", b"x\r\n"])
def test_an_event_of_endless_lines_is_no_json_and_not_taken_apart(line: bytes) -> None:
    (data,) = EventReader().feed(line * (1 << 20) + b'data: {"choices": []}\n\n')
    assert len(data) > 1 << 20
    with pytest.raises(InvalidChunk):
        read_chunk(data)


def test_an_event_of_some_lines_is_read() -> None:
    lines = b"id: 1\n" + b"data: 1,\n" * (MAX_LINES - 3) + b"data: 2\n\n"
    assert EventReader().feed(lines) == [b"1, " * (MAX_LINES - 3) + b"2"]


@pytest.mark.parametrize("blank", [b"\n\n", b"\r\r", b"\r\n\r\n"])
def test_blank_lines_are_counted_as_events_and_no_step_is_made_for_each(
    blank: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("powerband.openai.events._data", lambda block: block[5:].strip())
    reader = EventReader()
    assert reader.feed(blank * 1000 + b"data: 1\n\n") == [b"1"]
    assert reader.num_events == 1001
