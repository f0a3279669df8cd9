"""Tool calls and reasoning, cut after any event: the next replica goes on with the same ones.

The replicas are real but for their model, which repeats the last user message.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from gateways_for_tests import RunningGateway, running_gateway
from pass_through_gateway import Respond, client_of, last_record, serving
from test_resume_every_cut import cut_and_resumed
from vllm_replica import CHUNKED

from powerband.openai.events import EventReader
from server.servers_for_tests import RunningServer, running_server
from text.templates import QWEN3

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]
BERLIN = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Berlin"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
LONG = f"<think>\nIt rains.\n</think>\n\nI look, <b>wait</b>:\n{BERLIN}\n{NOW}"


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    template = tmp_path_factory.mktemp("template") / "template.jinja"
    template.write_text(QWEN3)
    with running_server("model=echo", "served_model_name=demo", f"chat_template={template}") as running:
        yield running


def says(text: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    usage = {"include_usage": True}
    return {"model": "demo", "messages": messages, "stream": True, "tools": TOOLS, "stream_options": usage, **more}


REQUESTS: dict[str, tuple[int, dict[str, Any]]] = {
    "a call": (1, says(BERLIN)),
    "a call with log-probabilities": (7, says(BERLIN, logprobs=True, top_logprobs=1)),
    "reasoning and an answer": (1, says("<think>\nIt rains.\n</think>\n\nIt is <b>wet</b>.")),
    "reasoning that is left out": (4, says(LONG, include_reasoning=False, max_tokens=30)),
    "reasoning with a budget": (3, says("<think>\none two three four five six", thinking_token_budget=3)),
    "reasoning, text and two calls": (5, says(LONG)),
    "until a limit in a call": (5, says(LONG, max_tokens=50)),
    "until a stop string in a call": (5, says(LONG, stop=["Berlin"])),
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_chat_cut_after_any_event_goes_on_with_the_same_call_and_reasoning(echo: RunningServer, kind: str) -> None:
    every, body = REQUESTS[kind]
    whole, found, num_cuts = cut_and_resumed(echo.url, "chat", body, 1, every)
    assert num_cuts > 4
    assert whole.seen["reasoning"] or whole.seen["calls"] or kind == "reasoning that is left out"
    num_uncounted = 0
    for number, client in enumerate(found, 1):
        if client.seen["reasoning_tokens"] is None:  # what counts the reasoning was lost: left out, not wrong
            client.seen["reasoning_tokens"] = whole.seen["reasoning_tokens"]
            num_uncounted += 1
        assert client.seen == whole.seen, f"cut number {number}"
        assert len(client.names) == 1
    assert num_uncounted <= 4


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway")) as running:
        yield running
        assert "Traceback" not in (running.database.parent / "gateway.log").read_text()


def breaks_once(echo: RunningServer, count: int) -> Respond:
    """A replica that sends what a real one sends, and the first time only so many events of it."""
    asked: list[dict[str, Any]] = []

    def respond(path: str, body: dict[str, Any]) -> bytes:
        asked.append(body)
        answer = echo.http.post(path, json={**body, "model": "demo"})
        events = [b"data: %b\n\n" % data for data in EventReader().feed(answer.content)]
        frames = [b"%x\r\n%b\r\n" % (len(one), one) for one in events]
        if len(asked) == 1:
            return b"".join((CHUNKED, *frames[:count]))
        assert body["resume_token_ids"] or count < 3
        return b"".join((CHUNKED, *frames, b"0\r\n\r\n"))

    return respond


@pytest.mark.parametrize("count", [2, 9, 17, 30, 44])
def test_the_official_client_sees_one_whole_answer(echo: RunningServer, gateway: RunningGateway, count: int) -> None:
    once = breaks_once(echo, count)
    with serving(gateway, once, once, engine="powerband", name=f"broken-{count}"):
        chat = says(LONG, model=f"broken-{count}")
        chat.pop("stream")
        with client_of(gateway).chat.completions.stream(**chat) as events:
            for _ in events:
                pass
            found = events.get_final_completion()
    [choice] = found.choices
    calls = [call.function for call in choice.message.tool_calls or []]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [
        ("get_weather", {"city": "Berlin"}),
        ("now", {}),
    ]
    assert choice.message.content == "I look, <b>wait</b>:\n"
    assert choice.finish_reason == "tool_calls"
    assert found.usage is not None
    record = last_record(gateway)
    assert record["resumed"] == 1
    assert record["record"]["output_tokens"] == found.usage.completion_tokens
    assert record["reasoning_tokens"] == found.usage.completion_tokens_details.reasoning_tokens > 0  # type: ignore[union-attr]
