"""What counts for requests that say nothing: the checkpoint's generation_config.json, then the defaults of the API."""

from __future__ import annotations

from typing import Any

import pytest

from powerband.engine.client.messages import EngineInfo
from powerband.server.generation.sampling import chat_params, completion_params
from powerband.server.protocol import ChatRequest, CompletionRequest, Message
from powerband.server.replica import Model


def model(**defaults: float) -> Model:
    info = EngineInfo(
        **{"model_folder": "", "max_model_len": 100, "vocab_size": 50, "eos_token_ids": [2], "kv_capacity_tokens": 100},
        **{"device": "cpu", "dtype": "float32", "summary": "", "config": {}, "sampling_defaults": defaults},
    )
    return Model(info, None, None)


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest(messages=[Message(role="user", content="hi")], **fields)


GIVEN = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.05}


def test_a_request_that_says_nothing_gets_what_the_checkpoint_says() -> None:
    for params in (
        chat_params(chat(), model(**GIVEN), 10),
        completion_params(CompletionRequest(prompt="a"), model(**GIVEN), 10),
    ):
        assert {name: getattr(params, name) for name in GIVEN} == GIVEN


def test_what_a_request_says_wins_and_null_says_nothing() -> None:
    params = chat_params(chat(temperature=0, top_p=None, repetition_penalty=1.0), model(**GIVEN), 10)
    assert (params.temperature, params.top_p, params.repetition_penalty, params.top_k) == (0, 0.95, 1.0, 20)


@pytest.mark.parametrize(
    ("default", "fields", "chat_limit", "completion_limit"),
    [
        (None, {}, 90, 16),
        (30, {}, 30, 16),
        (5, {}, 5, 5),
        (200, {}, 90, 16),
        (5, {"max_tokens": 40}, 40, 40),
        (5, {"min_tokens": 12}, 12, 12),
    ],
)
def test_max_new_tokens_is_the_limit_of_a_request_that_names_none(
    default: int | None, fields: dict[str, Any], chat_limit: int, completion_limit: int
) -> None:
    served = model() if default is None else model(max_tokens=default)
    assert chat_params(chat(**fields), served, 10).max_tokens == chat_limit
    assert completion_params(CompletionRequest(prompt="a", **fields), served, 10).max_tokens == completion_limit
