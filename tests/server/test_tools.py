"""Tool calls and reasoning in chats, from an engine that says what the last user message says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from servers_for_tests import RunningServer, running_server

from powerband.output_parsers.output_parser import MAX_EQUAL_CALLS
from text.templates import CHATML, QWEN3

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
BERLIN = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Berlin"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
CHAT = "/v1/chat/completions"
LONG = f"<think>\nIt is about\nthe weather.\n</think>\n\nI look, <b>wait</b>:\n{BERLIN}\n{NOW}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    template = tmp_path_factory.mktemp("template") / "template.jinja"
    template.write_text(QWEN3)
    with running_server("model=echo", f"chat_template={template}") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)


def says(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def answer(server: RunningServer, text: str, **body: Any) -> dict[str, Any]:
    reply = server.post(CHAT, messages=says(text), **body)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def chunks(server: RunningServer, text: str, **body: Any) -> list[dict[str, Any]]:
    reply = server.post(CHAT, messages=says(text), stream=True, **body)
    assert reply.status_code == 200, reply.text
    *events, done = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


def accumulated(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """As the official client adds deltas up."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            assert delta.get("reasoning") == delta.get("reasoning_content")
            message["content"] += delta.get("content") or ""
            message["reasoning_content"] += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls") or []:
                if "id" in call:
                    assert call["index"] == len(message["tool_calls"])
                    assert call["type"] == "function"
                    message["tool_calls"].append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
                message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
            message["finish_reason"] = choice["finish_reason"]
    return message


def test_calls_are_not_text(server: RunningServer) -> None:
    [choice] = answer(server, BERLIN, tools=TOOLS)["choices"]
    [call] = choice["message"].pop("tool_calls")
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": None}
    assert choice["finish_reason"] == "tool_calls"
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Berlin"}'}}


def test_a_stream_adds_up_to_the_whole_answer(server: RunningServer) -> None:
    [choice] = answer(server, LONG, tools=TOOLS)["choices"]
    message = choice["message"]
    streamed = accumulated(chunks(server, LONG, tools=TOOLS))
    assert message["content"] == streamed["content"] == "I look, <b>wait</b>:\n"
    assert message["reasoning_content"] == message["reasoning"] == streamed["reasoning_content"]
    assert message["reasoning"] == "It is about\nthe weather."
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": call["name"], "arguments": call["arguments"]} for call in streamed["tool_calls"]
    ]
    assert len({call["id"] for call in streamed["tool_calls"]}) == 2
    assert choice["finish_reason"] == streamed["finish_reason"] == "tool_calls"


def test_the_official_client_gets_the_same_whole_and_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "echo", "messages": says(LONG), "tools": TOOLS}
    whole = client.chat.completions.create(**asked).choices[0]
    with client.chat.completions.stream(**asked) as stream:
        last = stream.get_final_completion().choices[0]
    for choice in (whole, last):
        assert choice.finish_reason == "tool_calls"
        calls = [call for call in choice.message.tool_calls or [] if call.type == "function"]
        assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
            ("get_weather", {"city": "Berlin"}),
            ("now", {}),
        ]
        assert choice.message.content == "I look, <b>wait</b>:\n"


def test_an_agents_loop_goes_on_with_the_results(client: openai.OpenAI) -> None:
    messages: list[Any] = says(BERLIN)
    message = client.chat.completions.create(model="echo", messages=messages, tools=TOOLS).choices[0].message  # type: ignore[arg-type]  # plain dictionaries
    messages.append(message)
    [call] = message.tool_calls or []
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "21 degrees"})
    messages += says("It is 21 degrees.")
    last = client.chat.completions.create(model="echo", messages=messages, tools=TOOLS).choices[0]  # type: ignore[arg-type]  # plain dictionaries
    assert last.finish_reason == "stop"
    assert last.message.content == "It is 21 degrees."
    assert last.message.tool_calls is None


def test_a_resumed_stream_goes_on_with_the_same_deltas(server: RunningServer) -> None:
    """Cut after many tokens: what both replicas send adds up to what one sends."""
    whole = chunks(server, LONG, tools=TOOLS, return_token_ids=True)
    ids = [id for chunk in whole for choice in chunk["choices"] for id in choice.get("token_ids") or []]
    expected = accumulated(whole)
    for cut in range(1, len(ids) - 1, 4):
        before, num_tokens = [], 0
        for chunk in whole:
            if num_tokens == cut:
                break
            before.append(chunk)
            num_tokens += sum(len(choice.get("token_ids") or []) for choice in chunk["choices"])
        after = chunks(server, LONG, tools=TOOLS, resume_token_ids=ids[:cut])
        found = accumulated(before + after)
        for both in (found, expected):
            for call in both["tool_calls"]:
                call["id"] = ""
        assert found == expected, cut


def test_n_answers_are_read_each_for_itself(server: RunningServer) -> None:
    choices = answer(server, LONG, tools=TOOLS, n=3)["choices"]
    ids = [call["id"] for choice in choices for call in choice["message"]["tool_calls"]]
    assert len(set(ids)) == 6
    assert {choice["message"]["content"] for choice in choices} == {"I look, <b>wait</b>:\n"}


def test_an_output_that_is_cut_has_no_half_of_a_call(server: RunningServer) -> None:
    seen = set()
    for max_tokens in range(1, 60, 3):
        [choice] = answer(server, LONG, tools=TOOLS, max_tokens=max_tokens)["choices"]
        message = choice["message"]
        assert "I look, <b>wait</b>:\n".startswith(message["content"] or "")
        assert "It is about\nthe weather.".startswith(message.get("reasoning") or "")
        seen.add(choice["finish_reason"])
    assert seen <= {"length", "tool_calls"}


def test_stop_strings_and_logprobs_work_beside_calls(server: RunningServer) -> None:
    [choice] = answer(server, LONG, tools=TOOLS, stop=["wait"])["choices"]
    assert choice["message"]["content"] == "I look, <b>"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "wait")
    reply = answer(server, LONG, tools=TOOLS, logprobs=True, top_logprobs=1)
    assert len(reply["choices"][0]["logprobs"]["content"]) == reply["usage"]["completion_tokens"]
    streamed = chunks(server, LONG, tools=TOOLS, logprobs=True)
    rows = [
        row
        for chunk in streamed
        for choice in chunk["choices"]
        for row in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert len(rows) == reply["usage"]["completion_tokens"]


@pytest.mark.parametrize("stop", ["Berlin", '"', "\n{", "city", "}}", "name"])
def test_a_stop_string_inside_a_call_does_not_end_it(server: RunningServer, stop: str) -> None:
    text = f"I look.\n{BERLIN}\nThat was all, Berlin."
    reply = answer(server, text, tools=TOOLS, stop=[stop])
    assert reply["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Berlin"}'
    assert reply["choices"][0]["stop_reason"] == ("Berlin" if stop == "Berlin" else None)  # after the call it does
    streamed = accumulated(chunks(server, text, tools=TOOLS, stop=[stop]))
    assert [call["arguments"] for call in streamed["tool_calls"]] == ['{"city": "Berlin"}']


def test_an_answer_with_one_call_at_most_ends_with_it(server: RunningServer) -> None:
    reply = answer(server, f"{BERLIN}\n{NOW}\nand more", tools=TOOLS, parallel_tool_calls=False, return_token_ids=True)
    [choice] = reply["choices"]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_weather"]
    assert (choice["finish_reason"], choice["stop_reason"], choice["message"]["content"]) == ("tool_calls", None, None)
    again = answer(server, BERLIN, tools=TOOLS, return_token_ids=True)["choices"][0]["token_ids"]
    assert len(choice["token_ids"]) <= len(again)
    resumed = server.post(
        CHAT, messages=says(BERLIN), tools=TOOLS, parallel_tool_calls=False, resume_token_ids=again[:-1]
    )
    assert resumed.json()["error"]["code"] == "output_complete"


def test_a_model_that_makes_one_call_over_and_over_is_ended(server: RunningServer) -> None:
    [choice] = answer(server, "\n".join([BERLIN] * 20), tools=TOOLS)["choices"]
    assert len(choice["message"]["tool_calls"]) == MAX_EQUAL_CALLS
    assert choice["finish_reason"] == "tool_calls"


def test_reasoning_is_counted_and_can_be_left_out(server: RunningServer) -> None:
    reply = answer(server, "<think>\na b c d\n</think>\n\nyes")
    num_reasoning = reply["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert 4 <= num_reasoning < reply["usage"]["completion_tokens"] - 4
    hidden = answer(server, "<think>\na b c d\n</think>\n\nyes", include_reasoning=False)
    assert hidden["choices"][0]["message"] == {"role": "assistant", "content": "yes", "refusal": None}
    assert hidden["usage"]["completion_tokens_details"] == {"reasoning_tokens": num_reasoning}
    assert accumulated(chunks(server, LONG, include_reasoning=False))["reasoning_content"] == ""


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_budget_ends_the_reasoning(server: RunningServer, budget: int) -> None:
    text = "<think>\n" + "one two three four five six seven eight nine ten " * 3
    reply = answer(server, text, thinking_token_budget=budget, return_token_ids=True, logprobs=True)
    message, usage = reply["choices"][0]["message"], reply["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == budget
    assert message.get("reasoning", "") in text
    assert message["content"]  # it goes on after the reasoning
    assert len(reply["choices"][0]["token_ids"]) == usage["completion_tokens"]
    assert len(reply["choices"][0]["logprobs"]["content"]) == usage["completion_tokens"]
    streamed = accumulated(chunks(server, text, thinking_token_budget=budget))
    assert streamed["content"] == message["content"]
    assert answer(server, text, thinking_token_budget=-1)["choices"][0]["message"]["content"] == ""


def test_an_effort_of_none_turns_reasoning_off_where_the_template_can(server: RunningServer) -> None:
    def prompt_tokens(**body: Any) -> int:
        count: int = answer(server, "hi", max_tokens=1, **body)["usage"]["prompt_tokens"]
        return count

    off = prompt_tokens(chat_template_kwargs={"enable_thinking": False})
    assert off > prompt_tokens()
    assert prompt_tokens(reasoning_effort="none") == prompt_tokens(reasoning_effort="minimal") == off
    assert prompt_tokens(reasoning_effort="high") == prompt_tokens()
    assert prompt_tokens(reasoning_effort="high", chat_template_kwargs={"enable_thinking": False}) == off


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_thinking": False},
        {"thinking": {"type": "disabled"}},
        {"reasoning": {"effort": "none"}},
        {"reasoning": {"enabled": False}},
        {"think": False},
    ],
)
def test_reasoning_is_turned_off_as_other_servers_have_it(server: RunningServer, fields: dict[str, Any]) -> None:
    num_plain = answer(server, "yes")["usage"]["prompt_tokens"]
    assert answer(server, "yes", reasoning_effort="none")["usage"]["prompt_tokens"] > num_plain
    assert answer(server, "yes", **fields)["usage"]["prompt_tokens"] > num_plain
    assert answer(server, "yes", reasoning_effort="low", **fields)["usage"]["prompt_tokens"] == num_plain
    assert answer(server, "yes", chat_template_kwargs={"enable_thinking": True}, **fields)["usage"][
        "prompt_tokens"
    ] == (num_plain)


def test_reasoning_is_bounded_and_left_out_as_other_servers_have_it(server: RunningServer) -> None:
    text = "<think>\na b c d e f g\n</think>\n\nyes"
    bounded = answer(server, text, thinking={"type": "enabled", "budget_tokens": 2})
    assert bounded["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2
    assert "reasoning" not in answer(server, text, reasoning={"exclude": True})["choices"][0]["message"]


def test_tools_that_may_not_be_called_are_not_in_the_prompt(server: RunningServer) -> None:
    none = answer(server, BERLIN, tools=TOOLS, tool_choice="none")
    assert none["choices"][0]["message"]["content"] == BERLIN
    assert none["usage"]["prompt_tokens"] == answer(server, BERLIN)["usage"]["prompt_tokens"]


CALL = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
ASKED: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "noon"}
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("tools.2.function.name", {"tools": [*TOOLS, TOOLS[0]]}),
    ("tools.0.function.name", {"tools": [{"type": "function", "function": {"name": "two words"}}]}),
    ("tools.0.function.parameters.type", {"tools": [{"function": {"name": "f", "parameters": {"type": "array"}}}]}),
    ("tools.0.type", {"tools": [{"type": "web_search"}]}),
    ("tool_choice", {"tool_choice": "required"}),
    ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
    ("tool_choice.function.name", {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}),
    ("messages.1", {"messages": [*says("hi"), {"role": "tool", "content": "noon"}]}),
    ("messages.1.tool_call_id", {"messages": [*says("hi"), RESULT]}),
    ("messages.2.tool_call_id", {"messages": [*says("hi"), ASKED, {**RESULT, "tool_call_id": "call_2"}]}),
    ("messages.3.tool_call_id", {"messages": [*says("hi"), ASKED, RESULT, RESULT]}),
    ("messages.3.tool_call_id", {"messages": [*says("hi"), ASKED, *says("and?"), RESULT]}),
    ("messages.1.tool_calls.1.id", {"messages": [*says("hi"), {**ASKED, "tool_calls": [CALL, CALL]}]}),
    ("thinking_token_budget", {"thinking_token_budget": -2}),
    ("reasoning_effort", {"reasoning_effort": "huge"}),
]


@pytest.mark.parametrize(("param", "body"), WRONG)
def test_what_is_wrong_about_tools_is_named(server: RunningServer, param: str, body: dict[str, Any]) -> None:
    reply = server.post(CHAT, **{"messages": says("hi"), **body})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param, reply.text


@pytest.mark.parametrize("arguments", ["[1]", "1", "{", '"text"', "null"])
def test_arguments_that_are_no_object_are_named(server: RunningServer, arguments: str) -> None:
    call = {**CALL, "function": {"name": "now", "arguments": arguments}}
    reply = server.post(CHAT, messages=[*says("hi"), {**ASKED, "tool_calls": [call]}, RESULT, *says("and?")])
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "messages.1.tool_calls.0.function.arguments"


def test_a_strict_tools_schema_that_cannot_be_enforced_is_refused_by_name(server: RunningServer) -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "https://example.com/a"}}}
    function: dict[str, Any] = {"name": "f", "parameters": schema}
    assert answer(server, "hi", tools=[{"type": "function", "function": function}])
    reply = server.post(CHAT, messages=says("hi"), tools=[{"function": {**function, "strict": True}}])
    assert reply.status_code == 400
    assert reply.json()["error"]["param"].startswith("tools.0.function.parameters.properties.a")


def test_a_template_without_tools_refuses_them_and_without_reasoning_its_fields(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(CHATML)
    with running_server("model=echo", f"chat_template={template}", "tool_call_parser=hermes") as plain:
        reply = plain.post(CHAT, messages=says("hi"), tools=TOOLS)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "tools_not_supported")
        assert answer(plain, "hi", tools=TOOLS, tool_choice="none")["choices"][0]["message"]["content"] == "hi"
        for field in ({"reasoning_effort": "low"}, {"thinking_token_budget": 5}):
            reply = plain.post(CHAT, messages=says("hi"), **field)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, next(iter(field)))
        assert answer(plain, "hi", reasoning_effort="none")
        assert "completion_tokens_details" not in answer(plain, "hi")["usage"]
