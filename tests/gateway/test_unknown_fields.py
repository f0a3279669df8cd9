"""Other servers' answers have fields that the gateway does not know. Nothing that has content is left out."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from powerband.engines.base import CannotResume
from powerband.gateway.proxy.client_request import ClientRequest
from powerband.gateway.proxy.resume import Resumer
from powerband.gateway.proxy.stream_state import StreamState
from powerband.gateway.routes import ReplicaAddress
from powerband.gateway.upstream.client import UpstreamClient

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}


def replica(engine: str) -> ReplicaAddress:
    return ReplicaAddress(id="r", url="http://r:1", model="m", engine=engine)  # type: ignore[arg-type]  # as in a file


def stream_of(engine: str = "vllm", **fields: Any) -> StreamState:
    state = StreamState(ClientRequest(msgspec.json.encode({**CHAT, **fields}), "chat"), "m")
    state.begin(replica(engine))
    return state


def received(state: StreamState, **fields: Any) -> list[dict[str, Any]]:
    """What the client gets of one event."""
    data = state.process_event(msgspec.json.encode({"id": "x", "model": "m", **fields}), 0.0)
    return [msgspec.json.decode(one.removeprefix(b"data: ")) for one in data.split(b"\n\n") if one]


def choice(delta: Any, **fields: Any) -> list[dict[str, Any]]:
    return [{"index": 0, "delta": delta, "finish_reason": None, "token_ids": [7], **fields}]


@pytest.mark.parametrize("engine", ["vllm", "powerband", "openai"])
@pytest.mark.parametrize(
    "delta",
    [
        {"refusal": "I cannot"},
        {"audio": {"id": "a", "data": "AAAA"}},
        {"function_call": {"arguments": "{"}},
        {"reasoning_details": [{"text": "hm"}]},
        {"annotations": [{"type": "url_citation"}], "content": ""},
        {"progress": 0},
    ],
    ids=lambda delta: next(iter(delta)),
)
def test_a_delta_whose_content_is_in_an_unknown_field_is_passed_on(engine: str, delta: dict[str, Any]) -> None:
    (event,) = received(stream_of(engine), choices=choice(delta))
    assert event["choices"][0]["delta"] == delta
    assert "token_ids" not in event["choices"][0]


def test_a_choice_and_an_event_with_unknown_content_are_passed_on() -> None:
    (event,) = received(stream_of(), choices=choice({"content": ""}, content_filter_results={"hate": {}}))
    assert event["choices"][0]["content_filter_results"] == {"hate": {}}
    (event,) = received(stream_of(), choices=choice({"content": ""}), citations=["https://a"])
    assert event["citations"] == ["https://a"]
    (event,) = received(stream_of(), choices=[], prompt_filter_results=[{"prompt_index": 0}])
    assert event["prompt_filter_results"] == [{"prompt_index": 0}]
    (event,) = received(stream_of(), choices=[], usage=USAGE, citations=["https://a"])
    assert "usage" not in event


def test_an_event_without_content_is_left_out() -> None:
    nothing = {"content": "", "refusal": None, "tool_calls": [], "audio": {}, "annotations": []}
    assert received(stream_of(), choices=choice(nothing, logprobs=None, stop_reason=None), usage=None) == []
    assert received(stream_of(), choices=choice(None)) == []
    # Only the gateway asked for this usage. A client without include_usage expects choices in each event.
    assert received(stream_of("llamacpp"), choices=[], usage=USAGE, timings={"prompt_n": 1}) == []


def test_a_stream_with_unknown_content_is_not_begun_again_at_another_replica() -> None:
    client_request = ClientRequest(msgspec.json.encode({**CHAT, "max_tokens": 9}), "chat")
    state = StreamState(client_request, "m")
    state.begin(replica("vllm"))
    received(state, choices=choice({"refusal": "I cannot"}))
    resumer = Resumer(client_request, state, UpstreamClient(), "a")
    with pytest.raises(CannotResume):
        asyncio.run(resumer.plan(replica("vllm")))
