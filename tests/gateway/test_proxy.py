"""A gateway before scripted replicas, as clients see it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from gateways_for_tests import RunningGateway, gateway_before, text_of

from powerband.mock_server.behavior import Behavior, words

CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "one two three"}]}
TEXT = {"model": "scripted", "prompt": "one two three"}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with gateway_before(tmp_path_factory.mktemp("gateway"), Behavior(), Behavior()) as running:
        yield running


@pytest.fixture(scope="module")
def client(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0) as found:
        yield found


def test_the_openai_client_gets_whole_answers(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="scripted", prompt="one two three", max_tokens=5)
    assert answer.choices[0].text == words(0, 5)
    assert answer.usage
    assert answer.usage.completion_tokens == 5


def test_the_openai_client_gets_streams(client: openai.OpenAI) -> None:
    messages: Any = CHAT["messages"]
    stream = client.chat.completions.create(model="scripted", messages=messages, max_tokens=50, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == words(0, 50)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", None]


def test_usage_is_told_only_to_those_who_ask(gateway: RunningGateway) -> None:
    plain = gateway.stream("/v1/chat/completions", {**CHAT, "max_tokens": 3})
    asked = gateway.stream("/v1/chat/completions", {**CHAT, "max_tokens": 3, "stream_options": {"include_usage": True}})
    assert not any("usage" in one for one in plain[:-1])
    assert asked[-2]["usage"]["completion_tokens"] == 3
    assert plain[-1] == asked[-1] == "[DONE]"


def test_token_ids_are_told_only_to_those_who_ask(gateway: RunningGateway) -> None:
    plain = gateway.stream("/v1/completions", {**TEXT, "max_tokens": 4})
    asked = gateway.stream("/v1/completions", {**TEXT, "max_tokens": 4, "return_token_ids": True})
    assert not any("token_ids" in choice for one in plain[:-1] for choice in one["choices"])
    assert [id for one in asked[:-1] for choice in one["choices"] for id in choice["token_ids"]] == [0, 1, 2, 3]
    assert text_of(plain) == text_of(asked) == words(0, 4)
