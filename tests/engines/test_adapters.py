"""What is known of engines: complete, without overlaps, and how vLLM's streams continue."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, get_args

import pytest
from msgspec import Raw

from powerband.engines.base import BrokenStream, CannotResume, Continuation, ServerName
from powerband.engines.metrics import parse_metrics
from powerband.engines.registry import ADAPTERS, find_by_owner

TEXTS = {7: "a", 8: "b", 9: "cd"}  # of tokens
STREAM: dict[str, Any] = {"prompt": "x", "stream": True, "temperature": 0}


def test_every_server_that_a_route_may_name_has_an_adapter() -> None:
    assert {name: adapter.name for name, adapter in ADAPTERS.items()} == {name: name for name in get_args(ServerName)}


def test_the_owner_of_a_model_names_its_engine() -> None:
    assert {owner: found.name for owner in ("vllm", "TensorRT_LLM") if (found := find_by_owner(owner))} == {
        "vllm": "vllm",
        "TensorRT_LLM": "trtllm",
    }
    assert find_by_owner("") is find_by_owner("library") is None


def test_no_two_engines_share_a_name_of_a_metric() -> None:
    names = [name for adapter in ADAPTERS.values() for found in adapter.metrics.values() for name in found]
    names += [name for adapter in ADAPTERS.values() for name in adapter.histograms.values()]
    assert [name for name, times in Counter(names).items() if times > 1] == []


@pytest.mark.parametrize("name", ["powerband", "vllm", "sglang", "trtllm", "llamacpp"])
def test_every_known_metric_is_read_under_our_name(name: ServerName) -> None:
    adapter = ADAPTERS[name]
    page = b"".join(b"%b 2.5\n" % names[-1] for names in adapter.metrics.values())
    page += b"".join(b"%b_count 2\n%b_sum 3\n" % (name, name) for name in adapter.histograms.values())
    expected = dict.fromkeys(adapter.metrics, 2.5)
    parts = {f"{name}_{part}": value for name in adapter.histograms for part, value in (("count", 2), ("sum", 3))}
    assert parse_metrics(page) == {**expected, **parts}


def continued(fields: Mapping[str, Any], **changes: Any) -> Continuation:
    async def ask(method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        if path == "/detokenize":
            assert body is not None
            return {"prompt": "".join(TEXTS[token] for token in body["tokens"])}
        return {"data": [{"id": "m", "max_model_len": 100}]}

    known: dict[str, Any] = {"model": "m", "is_chat": False, "max_tokens": 10, "prompt_ids": [7], "has_sent_ids": False}
    known |= {"token_ids": [8, 9], "text": "bc", **changes}
    complete_stream = ADAPTERS["vllm"].complete_stream
    assert complete_stream is not None
    raw = {name: Raw(json.dumps(value).encode()) for name, value in fields.items()}
    return asyncio.run(complete_stream(BrokenStream(fields=raw, **known), ask))  # type: ignore[arg-type] # a coroutine


def test_vllm_continues_with_a_completion_of_prompt_and_output() -> None:
    found = continued({**STREAM, "min_tokens": 4, "echo": True})
    assert (found.kept, found.skipped) == (1, "c"), "the client has half of the second token's text"
    assert found.fields["prompt"] == [7, 8]
    assert (found.fields["max_tokens"], found.fields["min_tokens"]) == (9, 3)
    assert "echo" not in found.fields


def test_vllm_continues_a_chat_up_to_the_end_of_its_context() -> None:
    found = continued({"messages": [], "stream": True}, is_chat=True, max_tokens=None, text="bcd")
    assert (found.kept, found.skipped, found.fields["max_tokens"]) == (2, "", 100 - 1 - 2)
    assert "messages" not in found.fields


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 1.0},
        {"seed": 1, "temperature": 1.0},
        {"response_format": {"type": "json_object"}},
        {"tools": [{}]},
        {"min_tokens": "4"},
    ],
)
def test_vllm_does_not_continue_what_depends_on_the_output_alone(fields: dict[str, Any]) -> None:
    with pytest.raises(CannotResume):
        continued({**STREAM, **fields})
