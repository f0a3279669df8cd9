"""Chats with tools and reasoning, through a gateway to a replica that speaks as vLLM does, by the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import vllm_replica
from byte_replica import answer
from gateways_for_tests import RunningGateway, running_gateway
from pass_through_gateway import client_of, last_record, serving
from vllm_replica import CALL, CHUNKED, as_frames

TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CHAT: Any = {"model": "public", "messages": [{"role": "user", "content": "How is the weather?"}], "tools": [TOOL]}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), "--stream-idle-timeout-s=1") as running:
        yield running
        assert "Traceback" not in (running.database.parent / "gateway.log").read_text()


def test_a_whole_answer_with_calls_and_reasoning(gateway: RunningGateway) -> None:
    with serving(gateway) as (replica,):
        found = client_of(gateway).chat.completions.create(**CHAT, tool_choice="auto")
        message = found.choices[0].message
        assert [call.function.arguments for call in message.tool_calls or ()] == [CALL["arguments"]] * 2  # type: ignore[union-attr]
        assert (found.choices[0].finish_reason, found.model) == ("tool_calls", "public")
        assert message.model_extra is not None
        assert message.model_extra["reasoning"] == "hm"
        assert (replica.posts[-1]["tools"], len(replica.posts)) == ([TOOL], 1)
        assert last_record(gateway)["record"]["output_tokens"] == 9


def test_a_stream_of_calls(gateway: RunningGateway) -> None:
    with serving(gateway) as (replica,):
        chunks = list(client_of(gateway).chat.completions.create(**CHAT, stream=True))
        assert len(replica.posts) == 1
        calls: dict[int, str] = {}
        for chunk in chunks:
            for call in chunk.choices[0].delta.tool_calls or ():
                assert call.function is not None
                calls[call.index] = calls.get(call.index, "") + (call.function.arguments or "")
        assert calls == {0: CALL["arguments"], 1: CALL["arguments"]}
        reasoning = [chunk.choices[0].delta.model_extra or {} for chunk in chunks]
        assert "".join(one.get("reasoning", "") for one in reasoning) == "hm"
        assert (chunks[-1].choices[0].finish_reason, {chunk.model for chunk in chunks}) == ("tool_calls", {"public"})
        record = last_record(gateway)
        assert (record["record"]["prompt_tokens"], record["record"]["output_tokens"]) == (7, 9)
        assert not record["is_estimate"]


def test_the_clients_helper_assembles_the_calls(gateway: RunningGateway) -> None:
    with serving(gateway):
        with client_of(gateway).chat.completions.stream(**CHAT) as events:
            for _ in events:
                pass
            final = events.get_final_completion()
        calls = final.choices[0].message.tool_calls or []
        assert [(call.id, call.function.arguments) for call in calls] == [
            ("call_0", CALL["arguments"]),
            ("call_1", CALL["arguments"]),
        ]


def test_a_history_with_calls_and_their_results_arrives_as_it_was_sent(gateway: RunningGateway) -> None:
    with serving(gateway) as (replica,):
        client = client_of(gateway)
        asked = client.chat.completions.create(**CHAT).choices[0].message
        results = [{"role": "tool", "tool_call_id": call.id, "content": "12 °C"} for call in asked.tool_calls or ()]
        history = [*CHAT["messages"], asked.model_dump(), *results]
        found = client.chat.completions.create(**{**CHAT, "messages": history}, tool_choice="none")
        assert found.choices[0].message.content == vllm_replica.TEXT
        assert replica.posts[-1]["messages"] == history


@pytest.mark.parametrize("count", range(1, 12))
def test_a_stream_of_calls_that_breaks_ends_with_an_error_or_whole(gateway: RunningGateway, count: int) -> None:
    """Calls are parsed from the text, so no other replica can continue them: better no call than half of one."""

    def breaks(path: str, body: dict[str, Any]) -> bytes:
        return b"".join((CHUNKED, *as_frames(vllm_replica.STREAMS[path](body)[:count])))

    name = f"breaks-{count}"
    with serving(gateway, breaks, breaks, name=name):
        found = client_of(gateway).chat.completions.create(**{**CHAT, "model": name}, stream=True)
        if count < len(vllm_replica.chat_events({**CHAT, "return_token_ids": True})) - 1:
            with pytest.raises(openai.APIError):
                list(found)
        else:
            assert list(found)[-1].choices[0].finish_reason == "tool_calls"


def test_an_answer_that_lacks_a_choice_does_not_spoil_the_next_replicas(gateway: RunningGateway) -> None:
    posts = []

    def lacks_one_at_first(path: str, body: dict[str, Any]) -> bytes:
        posts.append(path)
        found = vllm_replica.chat(body)
        found["choices"] = [{**found["choices"][0], "index": index} for index in range(min(len(posts), 2))]
        return answer(json.dumps(found))

    with serving(gateway, lacks_one_at_first, lacks_one_at_first, name="twice"):
        found = client_of(gateway).chat.completions.create(**{**CHAT, "model": "twice"}, n=2, tool_choice="none")
    assert ([choice.index for choice in found.choices], len(posts)) == ([0, 1], 2)
