"""LlamaIndex's OpenAILike."""

from __future__ import annotations

import asyncio

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from reporting import (
    AGENT_QUESTION,
    AGENT_TOOLS,
    KEY,
    MAX_TOKENS,
    MODEL,
    TEXTS,
    URL,
    Weather,
    check_agent,
    check_weather,
    feature,
)

QUESTION = "What does os.path.join do?"
llm = OpenAILike(
    model=MODEL,
    api_base=f"{URL}/v1",
    api_key=KEY,
    is_chat_model=True,
    is_function_calling_model=True,
    max_tokens=MAX_TOKENS,
    temperature=0,
    max_retries=0,
)


def weather(city: str, days: int) -> str:
    """The weather of a city."""
    return f"It rains in {city} for {days} days."


@feature("chat, stream_chat")
def _() -> None:
    message = ChatMessage(role="user", content=QUESTION)
    assert llm.chat([message]).message.content
    assert "".join(part.delta or "" for part in llm.stream_chat([message]))


@feature("chat_with_tools")
def _() -> None:
    tool = FunctionTool.from_defaults(weather, fn_schema=Weather)
    answer = llm.chat_with_tools([tool], user_msg=QUESTION, tool_required=True)
    check_weather(llm.get_tool_calls_from_response(answer)[0].tool_kwargs)


@feature("FunctionAgent")
def _() -> None:
    agent = FunctionAgent(
        tools=[FunctionTool.from_defaults(function) for function in AGENT_TOOLS.values()], llm=llm, streaming=False
    )

    async def ask() -> str:
        return str(await agent.run(AGENT_QUESTION))

    check_agent(asyncio.run(ask()))


@feature("structured_predict")
def _() -> None:
    found = llm.structured_predict(Weather, PromptTemplate(QUESTION), llm_kwargs={"tool_required": True})
    assert isinstance(found, Weather)


@feature("OpenAILikeEmbedding")
def _() -> None:
    model = OpenAILikeEmbedding(model_name=MODEL, api_base=f"{URL}/v1", api_key=KEY, max_retries=0)
    assert len(model.get_text_embedding_batch(TEXTS)) == 2
    assert len(model.get_query_embedding(TEXTS[0])) > 8
