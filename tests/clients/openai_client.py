"""OpenAI's own client, in any version since 2.0."""

from __future__ import annotations

import json
from typing import Any

import openai
from reporting import (
    AGENT_QUESTION,
    AGENT_TOOLS,
    HI,
    KEY,
    MAX_TOKENS,
    MAX_TURNS,
    MODEL,
    PARAMETERS,
    TEXTS,
    URL,
    Weather,
    check_agent,
    check_weather,
    feature,
    functions,
    refusal,
)

client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
FUNCTION = {"name": "weather", "description": "The weather of a city", "parameters": PARAMETERS, "strict": True}
TOOL: Any = {"type": "function", "function": FUNCTION}
RESPONSES_TOOL: Any = {"type": "function", **FUNCTION}
CALL: Any = {"model": MODEL, "temperature": 0}
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


@feature("chat.completions.create")
def _() -> None:
    answer = client.chat.completions.create(messages=HI, max_completion_tokens=MAX_TOKENS, **CALL)
    assert answer.choices[0].message.content
    assert answer.usage


@feature("chat.completions.create, stream")
def _() -> None:
    stream = client.chat.completions.create(
        messages=HI, max_tokens=MAX_TOKENS, stream=True, stream_options={"include_usage": True}, **CALL
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].usage


@feature("chat.completions.stream")
def _() -> None:
    with client.chat.completions.stream(messages=HI, max_tokens=MAX_TOKENS, **CALL) as stream:
        assert stream.get_final_completion().choices[0].message.content


@feature("chat.completions.create, tools")
def _() -> None:
    for choice in ("required", NAMED):
        answer = client.chat.completions.create(
            messages=HI, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, **CALL
        )
        [call] = answer.choices[0].message.tool_calls or []
        check_weather(call.function.arguments)
        assert answer.choices[0].finish_reason == "tool_calls"
    history = [*HI, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "It rains."}]
    assert client.chat.completions.create(messages=history, tools=[TOOL], max_tokens=MAX_TOKENS, **CALL).choices


@feature("chat.completions.stream, tools")
def _() -> None:
    with client.chat.completions.stream(messages=HI, tools=[TOOL], tool_choice=NAMED, **CALL) as stream:
        [call] = stream.get_final_completion().choices[0].message.tool_calls or []
    check_weather(call.function.arguments)


@feature("chat.completions.parse")
def _() -> None:
    answer = client.chat.completions.parse(messages=HI, response_format=Weather, **CALL)
    assert isinstance(answer.choices[0].message.parsed, Weather)


@feature("completions.create")
def _() -> None:
    assert client.completions.create(prompt="def f(", max_tokens=5, **CALL).choices[0].text


@feature("responses.create")
def _() -> None:
    answer = client.responses.create(input=HI, instructions="Be brief.", max_output_tokens=MAX_TOKENS, **CALL)
    assert answer.output_text
    follow: Any = [*HI, *answer.output, {"role": "user", "content": "And os.walk?"}]
    assert client.responses.create(input=follow, max_output_tokens=MAX_TOKENS, **CALL).output_text


@feature("responses.stream")
def _() -> None:
    with client.responses.stream(input=HI, max_output_tokens=MAX_TOKENS, **CALL) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text


@feature("responses.create, tools")
def _() -> None:
    answer = client.responses.create(
        input=HI, tools=[RESPONSES_TOOL], tool_choice="required", parallel_tool_calls=False, **CALL
    )
    [call] = [item for item in answer.output if item.type == "function_call"]
    check_weather(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "It rains."}
    follow: Any = [*HI, *answer.output, result]
    assert client.responses.create(input=follow, tools=[RESPONSES_TOOL], max_output_tokens=MAX_TOKENS, **CALL).output


@feature("responses.stream, tools")
def _() -> None:
    with client.responses.stream(
        input=HI, tools=[RESPONSES_TOOL], tool_choice="required", parallel_tool_calls=False, **CALL
    ) as stream:
        for event in stream:
            if event.type == "response.function_call_arguments.done":
                check_weather(event.arguments)
        assert stream.get_final_response().output


@feature("responses.parse")
def _() -> None:
    assert isinstance(client.responses.parse(input=HI, text_format=Weather, **CALL).output_parsed, Weather)


@feature("chat.completions.create, an agent's loop")
def _() -> None:
    messages: Any = [{"role": "user", "content": AGENT_QUESTION}]
    tools: Any = [{"type": "function", "function": function} for function in functions()]
    for _ in range(MAX_TURNS):
        message = client.chat.completions.create(messages=messages, tools=tools, **CALL).choices[0].message
        if not message.tool_calls:
            break
        messages.append(message)
        for call in message.tool_calls:
            result = AGENT_TOOLS[call.function.name](**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    check_agent(message.content)
    assert len(messages) == 5


@feature("responses.create, an agent's loop")
def _() -> None:
    items: Any = [{"role": "user", "content": AGENT_QUESTION}]
    tools: Any = [{"type": "function", **function} for function in functions()]
    for _ in range(MAX_TURNS):
        answer = client.responses.create(input=items, tools=tools, **CALL)
        items += answer.output
        calls = [item for item in answer.output if item.type == "function_call"]
        if not calls:
            break
        for call in calls:
            result = AGENT_TOOLS[call.name](**json.loads(call.arguments))
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": result})
    check_agent(answer.output_text)


@feature("embeddings.create")
def _() -> None:
    asked: Any = {"model": MODEL, "input": TEXTS, "dimensions": 8}
    packed, plain = (client.embeddings.create(**asked, **more).data for more in ({}, {"encoding_format": "float"}))
    for one, other in zip(packed, plain, strict=True):  # the client asks for base64 unless told otherwise
        assert len(one.embedding) == 8
        assert all(abs(a - b) < 1e-6 for a, b in zip(one.embedding, other.embedding, strict=True))


@feature("errors")
def _() -> None:
    for wrong in ({"temperature": -1}, {"model": "gpt-9"}):
        error = refusal(lambda wrong=wrong: client.responses.create(input="x", **{**CALL, **wrong}))
        assert isinstance(error, openai.APIStatusError)
        assert error.param == next(iter(wrong))
