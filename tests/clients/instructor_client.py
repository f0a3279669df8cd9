"""instructor, by OpenAI's and Anthropic's clients."""

from __future__ import annotations

from typing import Any

import anthropic
import instructor
import openai
from reporting import HI, KEY, MAX_TOKENS, MODEL, URL, Weather, feature

OPENAI = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
ANTHROPIC = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0)
CALL: Any = {"model": MODEL, "messages": HI, "response_model": Weather, "max_retries": 0}

for mode in ("TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"):

    @feature(f"from_openai, {mode}")
    def _(mode: str = mode) -> None:
        client = instructor.from_openai(OPENAI, mode=instructor.Mode[mode])
        assert isinstance(client.chat.completions.create(**CALL), Weather)


@feature("from_anthropic, ANTHROPIC_TOOLS")
def _() -> None:
    client = instructor.from_anthropic(ANTHROPIC, mode=instructor.Mode.ANTHROPIC_TOOLS)
    assert isinstance(client.messages.create(max_tokens=MAX_TOKENS, **CALL), Weather)
