"""/v1/messages: Anthropic's types hold all of it, events come in its order, and errors name what was written."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from sdk_types import validated
from servers_for_tests import RunningServer, running_server

ANSWER = "user\nhi there"  # the model repeats its prompt
PATH = "/v1/messages"
HI: list[Any] = [{"role": "user", "content": "hi there"}]


@pytest.fixture
def client(server: RunningServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as found:
        yield found


def post(server: RunningServer, **body: Any) -> dict[str, Any]:
    answer = server.post(PATH, **{"messages": HI, "max_tokens": 30, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    validated(Message, found)
    return found


def events_of(server: RunningServer, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, each as Anthropic's type has it, with their names."""
    found = []
    full = {"messages": HI, "max_tokens": 30, **body, "stream": True}
    with server.http.stream("POST", PATH, json=full) as answer:
        assert answer.status_code == 200
        for block in "".join(answer.iter_text()).strip().split("\n\n"):
            name, data = block.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert name == f"event: {event['type']}"
            if event["type"] != "ping":  # the client skips it
                validated(RawMessageStreamEvent, event)
            found.append(event)
    return found


def refusal(server: RunningServer, **body: Any) -> dict[str, Any]:
    answer = server.post(PATH, **{"messages": HI, "max_tokens": 30, **body})
    assert answer.status_code == 400
    assert answer.json()["type"] == "error"
    error: dict[str, Any] = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


def counted(server: RunningServer, **body: Any) -> int:
    return int(validated(MessageTokensCount, server.post(f"{PATH}/count_tokens", **body).json()).input_tokens)


def tokens_of_chat(server: RunningServer, *messages: dict[str, Any]) -> int:
    return int(server.post("/tokenize", messages=list(messages)).json()["count"])


def test_the_official_client_creates_and_streams(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(model="parrot", messages=HI, max_tokens=30)
    assert (whole.content[0].text, whole.stop_reason) == (ANSWER, "end_turn")
    with client.messages.stream(model="parrot", messages=HI, max_tokens=30) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert (text, final.content[0].text, final.stop_reason) == (ANSWER, ANSWER, "end_turn")
    prompt = whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    assert client.messages.count_tokens(model="parrot", messages=HI).input_tokens == prompt
    follow: Any = [*HI, {"role": "assistant", "content": whole.content}, {"role": "user", "content": "go on"}]
    assert client.messages.create(model="parrot", messages=follow, max_tokens=30).content[0].text == ANSWER


def test_events_come_in_anthropics_order(server: RunningServer) -> None:
    events = events_of(server)
    assert [name for name, _ in itertools.groupby(event["type"] for event in events)] == [
        *("message_start", "ping", "content_block_start", "content_block_delta", "content_block_stop"),
        *("message_delta", "message_stop"),
    ]
    assert "".join(event["delta"].get("text", "") for event in events if "delta" in event) == ANSWER
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    started, ended = events[0]["message"]["usage"], events[-2]["usage"]
    assert started["input_tokens"] + started["cache_read_input_tokens"] == tokens_of_chat(server, *HI)
    assert ended["output_tokens"] == post(server)["usage"]["output_tokens"] > 0


def test_why_an_answer_ended(server: RunningServer) -> None:
    assert post(server, max_tokens=2)["stop_reason"] == "max_tokens"
    stopped = post(server, stop_sequences=["there", "never"])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "there")
    filled = post(server, max_tokens=100_000, ignore_eos=True)  # more than the context has room for
    assert filled["stop_reason"] == "model_context_window_exceeded"
    assert filled["usage"]["output_tokens"] + tokens_of_chat(server, *HI) == 512


def test_the_system_and_blocks_are_messages_of_the_chat(server: RunningServer) -> None:
    texts = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]
    parts = [{"type": "text", "text": block["text"]} for block in texts]
    asked: dict[str, Any] = {"system": "Be brief.", "messages": [{"role": "user", "content": texts}]}
    chat: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert counted(server, **asked) == tokens_of_chat(server, *chat)
    assert counted(server, **{**asked, "system": texts}) == tokens_of_chat(
        server, {**chat[0], "content": parts}, chat[1]
    )


def test_messages_of_one_role_in_a_row_are_one_turn(server: RunningServer) -> None:
    def says(role: str, *texts: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}

    apart = [{"role": "user", "content": "a"}, says("user", "b", "c"), says("assistant", "d"), says("assistant", "e")]
    together = [says("user", "a", "b", "c"), says("assistant", "d", "e"), *HI]
    assert counted(server, messages=[*apart, *HI]) == counted(server, messages=together)
    assert post(server, messages=[*apart, *HI])["content"] == post(server, messages=together)["content"]


def test_an_answer_goes_on_after_the_assistants_last_message(server: RunningServer) -> None:
    begun = [*HI, {"role": "assistant", "content": "I say"}]
    chat = {"messages": begun, "continue_final_message": True, "add_generation_prompt": False}
    assert counted(server, messages=begun) == server.post("/tokenize", **chat).json()["count"]
    assert post(server, messages=begun)["content"][0]["text"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": []}, "'messages' is []"),
        ({"max_tokens": None}, "'max_tokens' is null"),
        ({"max_tokens": 0}, "'max_tokens' is 0"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "'messages.0.role'"),
        ({"messages": [{"role": "user", "content": [{"type": "nonsense"}]}]}, "'messages.0.content.0.type'"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "Images are not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "Files are not supported"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "server_tool_use", "id": "a"}]}]},
            "'messages.0.content.0' is of type server_tool_use. Anthropic's own tools",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}]},
            "'messages.0.content.0' is of type tool_use, which a message of the role 'user' cannot have",
        ),
        (
            {"messages": [{"role": "user", "content": "a " * 2000}]},
            "takes 511 and one output token. Shorten the prompt.",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'tools.0' is of type web_search"),
        ({"tools": [{"name": "f"}]}, "'tools.0.input_schema' is missing"),
        ({"tool_choice": {"type": "some"}}, "'tool_choice.type'"),
        ({"temprature": 1}, "'temprature'"),
        ({"mcp_servers": [{"url": "x"}]}, "MCP servers"),
        ({"container": "c"}, "container"),
        ({"stop": ["x"]}, "Use 'stop_sequences'"),
        ({"max_completion_tokens": 3}, "Use 'max_tokens'"),
        ({"thinking": {"type": "much"}}, "'thinking.type'"),
        ({"temperature": -1}, "'temperature'"),
    ],
)
def test_errors_have_anthropics_form_and_name_the_field(
    server: RunningServer, body: dict[str, Any], words: str
) -> None:
    assert words in refusal(server, **body)["message"]


def test_a_form_of_the_answer_is_part_of_the_output_config(server: RunningServer) -> None:
    def sent(schema: dict[str, Any]) -> dict[str, Any]:
        return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}

    post(server, **sent({"type": "object"}))
    remote = {"type": "object", "properties": {"arguments": {"$ref": "http://example.com/schema"}}}
    assert "output_config.format.schema.properties.arguments" in refusal(server, **sent(remote))["message"]


def test_other_errors_have_anthropics_form(server: RunningServer, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(model="claude", messages=HI, max_tokens=3)
    assert caught.value.type == "not_found_error"
    assert server.http.get(PATH).json()["error"]["type"] == "invalid_request_error"  # method not allowed


def test_what_changes_nothing_is_taken(server: RunningServer) -> None:
    fields = {
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "cache_control": {"type": "ephemeral"},
        "context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]},
        "temperature": 0,
        "top_k": 5,
        "top_p": 0.9,
        "mcp_servers": [],
        "tools": [],
        "thinking": {"type": "disabled"},
    }
    answer = server.post(f"{PATH}?beta=true", messages=HI, max_tokens=5, **fields)
    assert answer.status_code == 200
    assert answer.headers["x-ignored-fields"] == "context_management"


def test_the_key_may_come_as_anthropics_clients_send_it() -> None:
    with running_server("api_key=secret") as server:
        with anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0) as client:
            assert client.messages.create(model="parrot", messages=HI, max_tokens=30).content[0].text == ANSWER
        wrong = anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0)
        with wrong as client, pytest.raises(anthropic.AuthenticationError):
            client.messages.create(model="parrot", messages=HI, max_tokens=3)


def test_a_client_that_leaves_ends_its_request(server: RunningServer) -> None:
    aborted = 'vllm:request_success_total{engine="0",finished_reason="abort",model_name="parrot"}'
    before = server.figure(aborted)
    body = {"messages": HI, "max_tokens": 400, "stream": True, "ignore_eos": True}
    with server.http.stream("POST", PATH, json=body) as answer:
        next(answer.iter_text())
    server.until(lambda: server.figure(aborted) == before + 1)
