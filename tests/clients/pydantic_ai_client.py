"""pydantic-ai's models for OpenAI's and Anthropic's APIs."""

from __future__ import annotations

from typing import Any

from anthropic import AsyncAnthropic
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from reporting import AGENT_QUESTION, AGENT_TOOLS, KEY, MAX_TOKENS, MODEL, URL, Weather, check_agent, feature

QUESTION = "What does os.path.join do?"
openai_provider = OpenAIProvider(base_url=f"{URL}/v1", api_key=KEY)
anthropic_provider = AnthropicProvider(anthropic_client=AsyncAnthropic(base_url=URL, api_key=KEY, max_retries=0))
MODELS: dict[str, Any] = {
    "OpenAIChatModel": OpenAIChatModel(MODEL, provider=openai_provider),
    "OpenAIResponsesModel": OpenAIResponsesModel(MODEL, provider=openai_provider),
    "AnthropicModel": AnthropicModel(MODEL, provider=anthropic_provider),
}
SETTINGS: Any = {"max_tokens": MAX_TOKENS}

for name, model in MODELS.items():

    @feature(f"{name}, text")
    def _(model: Any = model) -> None:
        agent = Agent(model, instructions="Be brief.", model_settings=SETTINGS)
        assert agent.run_sync(QUESTION).output
        stream = agent.run_stream_sync(QUESTION)
        assert "".join(stream.stream_text(delta=True))

    @feature(f"{name}, an agent's loop")
    def _(model: Any = model) -> None:
        agent = Agent(model, tools=list(AGENT_TOOLS.values()), model_settings={**SETTINGS, "temperature": 0})
        check_agent(agent.run_sync(AGENT_QUESTION).output)

    @feature(f"{name}, ToolOutput")
    def _(model: Any = model) -> None:
        agent = Agent(model, output_type=ToolOutput(Weather), model_settings=SETTINGS)
        assert isinstance(agent.run_sync(QUESTION).output, Weather)

    if name == "AnthropicModel":  # NativeOutput only for models that the client knows by name
        continue

    @feature(f"{name}, NativeOutput")
    def _(model: Any = model) -> None:
        agent = Agent(model, output_type=NativeOutput(Weather), model_settings=SETTINGS)
        assert isinstance(agent.run_sync(QUESTION).output, Weather)
