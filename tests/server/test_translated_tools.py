"""Tools and reasoning through OpenAI's Responses and Anthropic's Messages, with the official clients.

The model repeats its prompt, which the chat template makes of the last message alone: it answers what it is told to.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from openai.types.responses import Response, ResponseStreamEvent
from sdk_types import validated
from servers_for_tests import RunningServer, running_server

# All messages are in the prompt, as they have to be, but after the end that the model repeats up to.
TEMPLATE = """
{{- messages[-1].content }}<|im_end|>
{%- for message in messages[:-1] %}{{ message.role }}: {{ message.content }} {{ message.reasoning_content }}
{%- if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}{{ message.tool_call_id }}{% endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}{% if enable_thinking is false %}no thinking{% endif -%}
"""
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
THOUGHT = "<think>\nWell.\n</think>\n\n"
ARGUMENTS = {"city": "Oslo"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION: Any = {"type": "function", "name": "weather", "description": "Today's", "parameters": SCHEMA, "strict": True}
TOOL: Any = {"name": "weather", "description": "Today's", "input_schema": SCHEMA}
THINKING: Any = {"type": "enabled", "budget_tokens": 1024}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    template: Path = tmp_path_factory.mktemp("templates") / "last.jinja"
    template.write_text(TEMPLATE)
    with running_server(f"chat_template={template}", "tool_call_parser=hermes", "reasoning_parser=qwen3") as running:
        yield running


@pytest.fixture
def responses(server: RunningServer) -> Iterator[openai.resources.Responses]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client.responses


@pytest.fixture
def messages(server: RunningServer) -> Iterator[anthropic.resources.Messages]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client.messages


def events_of(server: RunningServer, path: str, kind: Any, **body: Any) -> list[dict[str, Any]]:
    found = []
    with server.http.stream("POST", path, json={**body, "stream": True}) as answer:
        for line in "".join(answer.iter_text()).splitlines():
            if line.startswith("data: ") and (event := json.loads(line.removeprefix("data: ")))["type"] != "ping":
                validated(kind, event)
                found.append(event)
    return found


def without_repeats(events: list[dict[str, Any]]) -> list[str]:
    return [name for name, _ in itertools.groupby(event["type"] for event in events)]


# ---- OpenAI's Responses


def test_a_response_has_reasoning_text_and_calls_as_items(server: RunningServer) -> None:
    asked = {"input": THOUGHT + "I look." + CALL + CALL, "tools": [FUNCTION]}
    answer = server.post("/v1/responses", **asked).json()
    thought, text, first, second = validated(Response, answer).output
    assert (thought.type, thought.content[0].text.strip(), thought.summary) == ("reasoning", "Well.", [])
    assert (text.type, text.content[0].text) == ("message", "I look.")
    for call in (first, second):
        assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", ARGUMENTS)
        assert call.status == "completed"
    assert first.call_id != second.call_id
    assert answer["tools"] == [FUNCTION]
    assert 0 < answer["usage"]["output_tokens_details"]["reasoning_tokens"] < answer["usage"]["output_tokens"]


def test_a_streams_items_come_one_after_the_other(server: RunningServer) -> None:
    asked = {"input": THOUGHT + "I look." + CALL, "tools": [FUNCTION]}
    events = events_of(server, "/v1/responses", ResponseStreamEvent, **asked)
    assert [name.removeprefix("response.") for name in without_repeats(events)] == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == events[-1][
        "response"
    ]["output"]
    added = [event for event in events if event["type"] == "response.output_item.added"]
    assert [event["output_index"] for event in added] == [0, 1, 2]
    assert (added[2]["item"]["name"], added[2]["item"]["arguments"]) == ("weather", "")
    for event in events:
        if "item_id" in event:
            assert event["item_id"] == added[event["output_index"]]["item"]["id"]


def test_where_a_summary_is_asked_for_the_reasoning_is_the_summary(server: RunningServer) -> None:
    asked = {"input": THOUGHT + "Yes.", "reasoning": {"summary": "auto"}}
    events = events_of(server, "/v1/responses", ResponseStreamEvent, **asked)
    assert [name.removeprefix("response.") for name in without_repeats(events)][2:8] == [
        *("output_item.added", "reasoning_summary_part.added", "reasoning_summary_text.delta"),
        *("reasoning_summary_text.done", "reasoning_summary_part.done", "output_item.done"),
    ]
    thought = events[-1]["response"]["output"][0]
    assert (thought["summary"][0]["text"].strip(), thought["content"]) == ("Well.", [])


def test_the_official_client_calls_a_function_and_sends_its_output(responses: openai.resources.Responses) -> None:
    history: Any = [{"role": "user", "content": THOUGHT + CALL}]
    answer = responses.create(model="parrot", input=history, tools=[FUNCTION])
    history += answer.output
    for item in answer.output:
        if item.type == "function_call":
            history.append({"type": "function_call_output", "call_id": item.call_id, "output": "It rains."})
    assert responses.create(model="parrot", input=history, tools=[FUNCTION]).output_text == "It rains."
    with responses.stream(model="parrot", input=CALL, tools=[FUNCTION]) as stream:
        assert stream.get_final_response().output[0].parsed_arguments == ARGUMENTS


def test_items_of_one_turn_are_one_message_of_the_chat(server: RunningServer) -> None:
    items = [
        {"role": "user", "content": "hi"},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Well."}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "Rain."}]},
        {"type": "function_call_output", "call_id": "c2", "output": "Sun."},
    ]
    calls = [{"id": id, "type": "function", "function": {"name": "weather", "arguments": "{}"}} for id in ("c1", "c2")]
    chat = [
        items[0],
        {"role": "assistant", "content": "I look.", "reasoning_content": "Well.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "Rain."},
        {"role": "tool", "tool_call_id": "c2", "content": "Sun."},
    ]
    counted = server.post("/v1/responses/input_tokens", input=items).json()["input_tokens"]
    assert counted == server.post("/tokenize", messages=chat).json()["count"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (
            {"input": [{"type": "function_call_output", "call_id": "x", "output": ""}]},
            "input.0.call_id",
            "function_call",
        ),
        (
            {"input": [{"type": "function_call", "call_id": "x", "name": "f", "arguments": "[]"}]},
            "input.0.arguments",
            "'input.0.arguments' is '[]'",
        ),
        ({"tools": [FUNCTION, FUNCTION]}, "tools.1.name", "'tools.1.name' is 'weather'"),
        (
            {"tools": [{"type": "function", "name": "f", "parameters": {"type": "string"}}]},
            "tools.0.parameters.type",
            "'tools.0.parameters'",
        ),
        ({"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name", "weather"),
        (
            {
                "tools": [FUNCTION],
                "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]},
            },
            "tool_choice.tools.0.name",
            "'tool_choice.tools.0.name'",
        ),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name", "'tools.0.name'"),
    ],
)
def test_errors_about_tools_name_the_place_in_the_request(
    server: RunningServer, body: dict[str, Any], param: str, words: str
) -> None:
    error = server.post("/v1/responses", **{"input": "hi", **body}).json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert "messages" not in error["message"]


def test_a_tool_may_be_written_as_in_chats(server: RunningServer) -> None:
    nested = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
    assert server.post("/v1/responses", input=CALL, tools=[nested]).json()["output"][0]["name"] == "weather"


# ---- Anthropic's Messages


def test_a_message_has_thinking_text_and_calls_as_blocks(server: RunningServer) -> None:
    told = [{"role": "user", "content": THOUGHT + "I look." + CALL}]
    asked = {"messages": told, "max_tokens": 200, "tools": [TOOL], "thinking": THINKING}
    answer = server.post("/v1/messages", **asked).json()
    thought, text, call = validated(Message, answer).content
    assert (thought.type, thought.thinking.strip()) == ("thinking", "Well.")
    assert (text.type, text.text) == ("text", "I look.")
    assert (call.type, call.name, call.input) == ("tool_use", "weather", ARGUMENTS)
    assert answer["stop_reason"] == "tool_use"
    assert answer["usage"]["output_tokens_details"]["thinking_tokens"] > 0


def test_a_streams_blocks_come_one_after_the_other(server: RunningServer) -> None:
    told = [{"role": "user", "content": THOUGHT + "I look." + CALL}]
    asked = {"messages": told, "max_tokens": 200, "tools": [TOOL], "thinking": THINKING}
    events = events_of(server, "/v1/messages", RawMessageStreamEvent, **asked)
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert without_repeats(events) == ["message_start", *block * 3, "message_delta", "message_stop"]
    starts = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert starts == ["thinking", "text", "tool_use"]
    partial = "".join(event["delta"].get("partial_json", "") for event in events if "delta" in event)
    assert json.loads(partial) == ARGUMENTS


def test_only_a_request_that_asks_for_thinking_gets_it(server: RunningServer) -> None:
    told = [{"role": "user", "content": THOUGHT + "Yes."}]
    for thinking in (None, {"type": "disabled"}, {**THINKING, "display": "omitted"}):
        answer = server.post("/v1/messages", messages=told, max_tokens=200, thinking=thinking).json()
        assert [block["type"] for block in answer["content"]] == ["text"]
    for thinking in (THINKING, {"type": "adaptive"}):
        answer = server.post("/v1/messages", messages=told, max_tokens=200, thinking=thinking).json()
        assert [block["type"] for block in answer["content"]] == ["thinking", "text"]
    counts = [
        server.post("/v1/messages/count_tokens", messages=told, thinking=thinking).json()["input_tokens"]
        for thinking in (None, {"type": "adaptive"})
    ]
    assert counts[0] > counts[1]  # the template writes that there is to be none


def test_the_official_client_uses_a_tool_and_sends_its_result(messages: anthropic.resources.Messages) -> None:
    history: Any = [{"role": "user", "content": THOUGHT + CALL}]
    asked: Any = {"model": "parrot", "max_tokens": 200, "tools": [TOOL], "thinking": THINKING}
    answer = messages.create(messages=history, **asked)
    [use] = [block for block in answer.content if block.type == "tool_use"]
    result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "It rains."}]}
    history += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    assert messages.create(messages=history, **asked).content[0].text == "It rains."
    with messages.stream(messages=history[:1], **asked) as stream:
        assert stream.get_final_message().content[-1].input == ARGUMENTS


def test_blocks_of_one_turn_are_messages_of_the_chat(server: RunningServer) -> None:
    uses = [{"type": "tool_use", "id": id, "name": "weather", "input": {}} for id in ("c1", "c2")]
    results = [
        {"type": "tool_result", "tool_use_id": "c1", "content": "Rain."},
        {"type": "tool_result", "tool_use_id": "c2", "is_error": True},
    ]
    thought = {"type": "thinking", "thinking": "Well.", "signature": "x"}
    told = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [thought, {"type": "text", "text": "I look."}, *uses]},
        {"role": "user", "content": [*results, {"type": "text", "text": "And now?"}]},
    ]
    calls = [{"id": id, "type": "function", "function": {"name": "weather", "arguments": "{}"}} for id in ("c1", "c2")]
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "Well.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "Rain."},
        {"role": "tool", "tool_call_id": "c2", "content": "The tool failed."},
        {"role": "user", "content": "And now?"},
    ]
    counted = server.post("/v1/messages/count_tokens", messages=told, thinking={"type": "adaptive"}).json()
    assert counted["input_tokens"] == server.post("/tokenize", messages=chat).json()["count"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
            "'messages.0.content.0' is the result of a tool",
        ),
        ({"tools": [TOOL, TOOL]}, "'tools.1.name' is 'weather'"),
        ({"tools": [{"name": "f", "input_schema": {"type": "string"}}]}, "'tools.0.input_schema'"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "'tool_choice.name' is 'g'"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
    ],
)
def test_errors_about_tools_of_messages_name_the_place(server: RunningServer, body: dict[str, Any], words: str) -> None:
    asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, **body}
    assert words in server.post("/v1/messages", **asked).json()["error"]["message"]
