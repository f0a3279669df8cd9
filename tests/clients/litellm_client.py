"""LiteLLM, by OpenAI's and Anthropic's APIs."""

from __future__ import annotations

import json
from typing import Any

import litellm
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
)

TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
APIS: dict[str, Any] = {
    "openai": {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": KEY, "max_retries": 0},
    "anthropic": {"model": f"anthropic/{MODEL}", "api_base": URL, "api_key": KEY, "max_retries": 0},
}

for name, api in APIS.items():

    @feature(f"completion, {name}")
    def _(api: Any = api) -> None:
        assert litellm.completion(messages=HI, max_tokens=MAX_TOKENS, **api).choices[0].message.content
        chunks = litellm.completion(messages=HI, max_tokens=MAX_TOKENS, stream=True, **api)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    @feature(f"completion, {name}, tools")
    def _(api: Any = api) -> None:
        choice = {"type": "function", "function": {"name": "weather"}}
        answer = litellm.completion(messages=HI, tools=[TOOL], tool_choice=choice, max_tokens=MAX_TOKENS, **api)
        check_weather(answer.choices[0].message.tool_calls[0].function.arguments)

    @feature(f"completion, {name}, an agent's loop")
    def _(api: Any = api) -> None:
        messages: list[Any] = [{"role": "user", "content": AGENT_QUESTION}]
        tools = [{"type": "function", "function": function} for function in functions()]
        for _ in range(MAX_TURNS):
            message = litellm.completion(messages=messages, tools=tools, temperature=0, max_tokens=100, **api)
            message = message.choices[0].message
            if not message.tool_calls:
                break
            messages.append(message)
            for call in message.tool_calls:
                result = AGENT_TOOLS[call.function.name](**json.loads(call.function.arguments))
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        check_agent(message.content)


@feature("completion, openai, response_format")
def _() -> None:
    answer = litellm.completion(messages=HI, response_format=Weather, **APIS["openai"])
    check_weather(answer.choices[0].message.content)


@feature("responses, openai")
def _() -> None:
    assert litellm.responses(input="What does os.path.join do?", max_output_tokens=MAX_TOKENS, **APIS["openai"]).output


@feature("embedding, openai")
def _() -> None:
    vectors = litellm.embedding(input=TEXTS, encoding_format="float", **APIS["openai"]).data
    assert [len(one["embedding"]) > 8 for one in vectors] == [True, True]
