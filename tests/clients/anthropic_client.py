"""Anthropic's own client."""

from __future__ import annotations

from typing import Any

import anthropic
from reporting import (
    AGENT_QUESTION,
    AGENT_TOOLS,
    HI,
    KEY,
    MAX_TOKENS,
    MAX_TURNS,
    MODEL,
    PARAMETERS,
    URL,
    Weather,
    check_agent,
    check_weather,
    feature,
    functions,
    refusal,
)

client = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0)
TOOL: Any = {"name": "weather", "description": "The weather of a city", "input_schema": PARAMETERS}
CALL: Any = {"model": MODEL, "max_tokens": MAX_TOKENS}


@feature("messages.create")
def _() -> None:
    answer = client.messages.create(messages=HI, system="Be brief.", stop_sequences=["\n\n"], **CALL)
    assert answer.content[0].type == "text"
    follow: Any = [*HI, {"role": "assistant", "content": answer.content}, {"role": "user", "content": "And os.walk?"}]
    assert client.messages.create(messages=follow, **CALL).usage.output_tokens


@feature("messages.stream")
def _() -> None:
    with client.messages.stream(messages=HI, **CALL) as stream:
        assert "".join(stream.text_stream)
        assert stream.get_final_message().stop_reason in ("end_turn", "max_tokens")


@feature("messages.create, tools")
def _() -> None:
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "weather"}):
        answer = client.messages.create(messages=HI, tools=[TOOL], tool_choice=choice, **CALL)
        [use] = [block for block in answer.content if block.type == "tool_use"]
        check_weather(use.input)
        assert answer.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "It rains."}
    follow: Any = [*HI, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(messages=follow, tools=[TOOL], **CALL).content


@feature("messages.stream, tools")
def _() -> None:
    choice: Any = {"type": "tool", "name": "weather"}
    with client.messages.stream(messages=HI, tools=[TOOL], tool_choice=choice, **CALL) as stream:
        check_weather(stream.get_final_message().content[0].input)


@feature("messages.create, an agent's loop")
def _() -> None:
    messages: Any = [{"role": "user", "content": AGENT_QUESTION}]
    tools: Any = [
        {"name": one["name"], "description": one["description"], "input_schema": one["parameters"]}
        for one in functions()
    ]
    for _ in range(MAX_TURNS):
        answer = client.messages.create(messages=messages, tools=tools, extra_body={"temperature": 0}, **CALL)
        uses: Any = [block for block in answer.content if block.type == "tool_use"]
        if not uses:
            break
        messages.append({"role": "assistant", "content": answer.content})
        results = [(use.id, AGENT_TOOLS[use.name](**use.input)) for use in uses]
        blocks = [{"type": "tool_result", "tool_use_id": id, "content": result} for id, result in results]
        messages.append({"role": "user", "content": blocks})
    check_agent("".join(block.text for block in answer.content if block.type == "text"))


@feature("messages.parse")
def _() -> None:
    assert isinstance(client.messages.parse(messages=HI, output_format=Weather, **CALL).parsed_output, Weather)


@feature("messages.count_tokens")
def _() -> None:
    assert client.messages.count_tokens(messages=HI, model=MODEL).input_tokens > 5


@feature("errors")
def _() -> None:
    error = refusal(lambda: client.messages.create(messages=[], **CALL))
    assert isinstance(error, anthropic.BadRequestError)
    assert error.type == "invalid_request_error"
