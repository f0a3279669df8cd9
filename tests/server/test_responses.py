"""/v1/responses: OpenAI's types hold all of it, events come in OpenAI's order, and errors name what was written."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from sdk_types import validated
from servers_for_tests import RunningServer

ANSWER = "user\nhi there"  # the model repeats its prompt
PATH = "/v1/responses"
HI = "hi there"


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def events_of(server: RunningServer, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, each as OpenAI's type has it, with their names and numbers."""
    found = []
    with server.http.stream("POST", PATH, json={"input": HI, **body, "stream": True}) as answer:
        assert answer.status_code == 200
        for block in "".join(answer.iter_text()).strip().split("\n\n"):
            name, data = block.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert name == f"event: {event['type']}"
            assert event["sequence_number"] == len(found)
            validated(ResponseStreamEvent, event)
            found.append(event)
    return found


def refusal(server: RunningServer, **body: Any) -> dict[str, Any]:
    answer = server.post(PATH, **{"input": HI, **body})
    assert answer.status_code == 400
    error: dict[str, Any] = answer.json()["error"]
    return error


def test_the_official_client_creates_and_streams(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="parrot", input=HI)
    assert (whole.output_text, whole.status) == (ANSWER, "completed")
    assert whole.usage
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    with client.responses.stream(model="parrot", input=HI) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert ("".join(deltas), final.output_text) == (ANSWER, ANSWER)
    assert client.responses.input_tokens.count(model="parrot", input=HI).input_tokens == whole.usage.input_tokens


def test_what_came_back_can_be_sent_back(client: openai.OpenAI) -> None:
    history: Any = [{"role": "user", "content": HI}]
    history += client.responses.create(model="parrot", input=history).output
    raw = client.responses.with_raw_response.create(model="parrot", input=history)
    assert "x-ignored-fields" not in raw.headers
    history.append({"role": "user", "content": "go on"})
    assert client.responses.create(model="parrot", input=history, max_output_tokens=20).output_text == ANSWER


def test_a_response_has_exactly_openais_fields(server: RunningServer) -> None:
    sent = {
        "instructions": "Be brief.",
        "metadata": {"a": "b"},
        "user": "someone",
        "temperature": 0.5,
        "top_p": 0.9,
        "max_output_tokens": 3,
        "parallel_tool_calls": False,
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "truncation": "disabled",
    }
    answer = server.post(PATH, input=HI, store=True, service_tier="auto", **sent).json()
    found = validated(Response, answer)
    assert {name: answer[name] for name in sent} == sent
    assert answer["store"] is False
    assert found.incomplete_details.reason == "max_output_tokens"
    assert found.output[0].status == "incomplete"
    assert found.completed_at is None


def test_events_come_in_openais_order(server: RunningServer) -> None:
    events = events_of(server)
    names = [event["type"].removeprefix("response.") for event in events]
    assert [name for name, _ in itertools.groupby(names)] == [
        *("created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []
    assert "".join(event.get("delta", "") for event in events) == ANSWER
    [item] = events[-1]["response"]["output"]
    assert item == events[-2]["item"]
    assert events[-1]["response"]["usage"]["output_tokens"] > 0


def test_a_stream_ends_as_its_whole_response_does(server: RunningServer) -> None:
    body = {"input": HI, "include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 6}
    whole = server.post(PATH, **body).json()
    last = events_of(server, **body)[-1]
    assert last["type"] == "response.incomplete"

    def without_ids(response: dict[str, Any]) -> Any:
        text = json.dumps({**response, "created_at": 0})
        return json.loads(text.replace(response["id"].removeprefix("resp_"), ""))

    assert without_ids(last["response"])["output"] == without_ids(whole)["output"]
    assert len(whole["output"][0]["content"][0]["logprobs"]) == 6
    assert len(whole["output"][0]["content"][0]["logprobs"][0]["top_logprobs"]) == 2


def test_a_message_of_several_parts_is_one_message(server: RunningServer) -> None:
    parts = [{"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}]
    for content in (parts, [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]):
        asked = [{"role": "user", "content": content}]
        chat = [{"role": "user", "content": [{"type": "text", "text": part["text"]} for part in parts]}]
        counted = server.post("/v1/responses/input_tokens", input=asked).json()["input_tokens"]
        assert counted == server.post("/tokenize", messages=chat).json()["count"]


def test_instructions_come_before_the_input_as_the_system(server: RunningServer) -> None:
    counted = server.post("/v1/responses/input_tokens", input=HI, instructions="Be brief.").json()["input_tokens"]
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": HI}]
    assert counted == server.post("/tokenize", messages=chat).json()["count"]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("background", True, "in the background"),
        ("conversation", "conv_1", "'input'"),
        ("conversation", {"id": "conv_1"}, "'input'"),
        ("previous_response_id", "resp_1", "'input'"),
        ("prompt", {"id": "pmpt_1"}, "Stored prompts"),
        ("context_management", [{"type": "compaction"}], "Compaction"),
        ("moderation", {"model": "m"}, "Moderation"),
        ("n", 2, "More than one answer"),
        ("messages", [{"role": "user", "content": "x"}], "'input'"),
        ("max_tokens", 3, "max_output_tokens"),
        ("response_format", {"type": "json_object"}, "text.format"),
        ("reasoning_effort", "low", "reasoning.effort"),
        ("guided_json", {"type": "object"}, "structured_outputs"),
    ],
)
def test_what_is_not_there_is_refused_by_name(server: RunningServer, field: str, value: Any, words: str) -> None:
    error = refusal(server, **{field: value})
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert words in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "Hosted tools"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools.0.type", "Hosted tools"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools.0.type", "Custom tools"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type", "Hosted tools"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0.type", "Send the item itself"),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input.0.type", "Hosted tools"),
        ({"input": [{"type": "compaction", "encrypted_content": "x"}]}, "input.0.type", "Compaction"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0.type",
            "Images",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
            "input.0.content.0.type",
            "Files",
        ),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "Verbosity"),
    ],
)
def test_items_and_tools_that_are_not_there_are_refused_by_place(
    server: RunningServer, body: dict[str, Any], param: str, words: str
) -> None:
    error = refusal(server, **body)
    assert (error["param"], error["code"]) == (param, "unsupported_parameter")
    assert words in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"input": []}, "input", "1 to 4095 entries"),
        ({"input": None}, "input", "a text or a list"),
        ({"input": [{"role": "user", "content": 3}]}, "input.0.content", "a text"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role", "assistant"),
        ({"input": [{"type": "nonsense"}]}, "input.0.type", "function_call_output"),
        ({"input": [{"content": "x"}]}, "input.0.type", "missing"),
        ({"input": [{"role": "user", "content": "x", "colour": 1}]}, "input.0.colour", "Unknown field"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input.0.content.0.text", "missing"),
        ({"input": "a " * 2000}, "input", "context"),
        ({"max_output_tokens": 0}, "max_output_tokens", "from 1"),
        ({"max_output_tokens": 10**6}, "max_output_tokens", "Lower max_output_tokens"),
        ({"temperature": -1}, "temperature", "from 0"),
        ({"temprature": 1}, "temprature", "temperature"),
        ({"top_logprobs": 2}, "top_logprobs", "include"),
        ({"include": ["everything"]}, "include.0", "message.output_text.logprobs"),
        ({"metadata": {"a": 1}}, "metadata", "a text"),
        ({"stream_options": {"include_usage": True}}, "stream_options.include_usage", "Unknown field"),
    ],
)
def test_errors_name_the_field_as_it_was_written(
    server: RunningServer, body: dict[str, Any], param: str, words: str
) -> None:
    error = refusal(server, **body)
    assert error["param"] == param
    assert words in error["message"]
    assert not any(name in error["message"] for name in ("messages", "max_tokens", "max_completion_tokens"))


def test_a_form_of_the_answer_is_part_of_text(server: RunningServer) -> None:
    form = {"type": "json_schema", "name": "city", "schema": {"type": "object"}, "strict": True, "description": None}
    answer = server.post(PATH, input=HI, text={"format": form}, max_output_tokens=3).json()
    assert validated(Response, answer).text.format.name == "city"
    assert answer["text"]["format"] == form
    remote = {"type": "object", "properties": {"a": {"$ref": "http://example.com/schema"}}}
    error = refusal(server, text={"format": {**form, "schema": remote}})
    assert error["param"].startswith("text.format.schema.properties.a")
    assert error["param"] in error["message"]
    assert "response_format" not in error["message"]


def test_the_oldest_turns_of_a_long_conversation_are_left_out_where_that_is_asked_for(server: RunningServer) -> None:
    turns = [
        {"role": role, "content": f"{number} " + "word " * 60} for number in range(20) for role in ("user", "assistant")
    ]
    last = {"role": "user", "content": HI}
    asked = {"input": [*turns, last], "instructions": "Be brief."}
    assert refusal(server, **asked)["param"] == "input"
    counted = server.post("/v1/responses/input_tokens", **asked, truncation="auto").json()["input_tokens"]
    kept = [
        server.post("/v1/responses/input_tokens", **{**asked, "input": [*turns[start:], last]}).json()
        for start in range(0, len(turns), 2)
    ]
    assert counted == next(one["input_tokens"] for one in kept if "input_tokens" in one)
    assert server.post(PATH, **asked, truncation="auto").json()["usage"]["input_tokens"] == counted
    too_long = {"input": [*turns[:1], {"role": "user", "content": "word " * 600}], "truncation": "auto"}
    assert refusal(server, **too_long)["param"] == "input"
    far_too_long = refusal(server, input="word " * 100_000)
    assert (far_too_long["param"], far_too_long["code"]) == ("input", "context_length_exceeded")


def test_settings_that_ask_for_nothing_are_taken(server: RunningServer) -> None:
    nothing = {
        **dict.fromkeys(("background", "conversation", "previous_response_id", "prompt", "temperature", "tools")),
        **{"background": False, "text": {"format": {"type": "text"}, "verbosity": "medium"}, "tools": []},
        **{"reasoning": {"effort": None, "summary": "auto"}, "include": ["reasoning.encrypted_content"]},
        **{"stream_options": None, "tool_choice": "auto", "parallel_tool_calls": True, "max_tool_calls": 3},
        **{"max_output_tokens": 4.0, "service_tier": "flex", "prompt_cache_retention": "24h"},
    }
    assert validated(Response, server.post(PATH, input=HI, **nothing).json()).status == "incomplete"


def test_a_client_that_leaves_ends_its_request(server: RunningServer) -> None:
    aborted = 'vllm:request_success_total{engine="0",finished_reason="abort",model_name="parrot"}'
    before = server.figure(aborted)
    body = {"input": HI, "stream": True, "max_output_tokens": 400, "ignore_eos": True}
    with server.http.stream("POST", PATH, json=body) as answer:
        next(answer.iter_text())
    server.until(lambda: server.figure(aborted) == before + 1)


def test_nothing_is_stored(server: RunningServer) -> None:
    made = server.post(PATH, input=HI).json()["id"]
    for method, path in (("GET", made), ("DELETE", made), ("POST", f"{made}/cancel"), ("GET", f"{made}/input_items")):
        answer: httpx.Response = server.http.request(method, f"{PATH}/{path}")
        assert answer.status_code == 404
        assert "not stored" in answer.json()["error"]["message"]
