"""LangChain's models for OpenAI's and Anthropic's APIs."""

from __future__ import annotations

from typing import Any

from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from reporting import (
    AGENT_QUESTION,
    AGENT_TOOLS,
    KEY,
    MAX_TOKENS,
    MAX_TURNS,
    MODEL,
    TEXTS,
    URL,
    Weather,
    check_agent,
    check_weather,
    feature,
)

QUESTION = "What does os.path.join do?"
_OPENAI: Any = {"model": MODEL, "base_url": f"{URL}/v1", "api_key": KEY, "temperature": 0, "max_retries": 0}


@tool(args_schema=Weather)
def weather(city: str, days: int) -> str:
    """The weather of a city."""
    return f"It rains in {city} for {days} days."


def check_model(name: str, model: Any) -> None:
    @feature(f"{name}.invoke, stream")
    def _() -> None:
        answer = model.invoke(QUESTION)
        assert answer.text
        assert answer.usage_metadata["output_tokens"] > 0
        assert "".join(chunk.text for chunk in model.stream(QUESTION))

    @feature(f"{name}.bind_tools")
    def _() -> None:
        bound = model.bind_tools([weather], tool_choice="weather")
        answer = bound.invoke(QUESTION)
        [call] = answer.tool_calls
        check_weather(call["args"])
        history = [HumanMessage(QUESTION), answer, ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])]
        assert model.bind_tools([weather]).invoke(history)
        streamed = None
        for chunk in bound.stream(QUESTION):
            streamed = chunk if streamed is None else streamed + chunk
        assert streamed is not None
        check_weather(streamed.tool_calls[0]["args"])

    @feature(f"{name}, an agent's loop")
    def _() -> None:
        bound = model.bind_tools(list(AGENT_TOOLS.values()))
        messages: list[Any] = [HumanMessage(AGENT_QUESTION)]
        for _ in range(MAX_TURNS):
            messages.append(answer := bound.invoke(messages))
            if not answer.tool_calls:
                break
            for call in answer.tool_calls:
                result = AGENT_TOOLS[call["name"]](**call["args"])
                messages.append(ToolMessage(result, tool_call_id=call["id"]))
        check_agent(answer.text)

    for method in ("json_schema", "function_calling"):

        @feature(f"{name}.with_structured_output, {method}")
        def _(method: str = method) -> None:
            assert isinstance(model.with_structured_output(Weather, method=method).invoke(QUESTION), Weather)


check_model("ChatOpenAI", ChatOpenAI(max_completion_tokens=MAX_TOKENS, **_OPENAI))
check_model("ChatOpenAI (Responses)", ChatOpenAI(use_responses_api=True, max_completion_tokens=MAX_TOKENS, **_OPENAI))
_anthropic: Any = {"model": MODEL, "base_url": URL, "api_key": KEY, "max_tokens": MAX_TOKENS, "max_retries": 0}
check_model("ChatAnthropic", ChatAnthropic(**_anthropic))


@feature("OpenAIEmbeddings, check_embedding_ctx_length=False")
def _() -> None:
    """With the check, the client would send token ids of an OpenAI model."""
    model = OpenAIEmbeddings(
        model=MODEL, base_url=f"{URL}/v1", api_key=KEY, check_embedding_ctx_length=False, max_retries=0
    )
    assert len(model.embed_documents(TEXTS)) == 2
    assert len(model.embed_query(TEXTS[0])) > 8
