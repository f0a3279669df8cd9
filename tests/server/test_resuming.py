"""A replica goes on after output that another one gave: what both say together is what one alone says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from servers_for_tests import RunningServer, running_server

COMMAND = ("-m", "powerband", "serve", "demo", "--port")
# In float32: where sixteen bits round two tokens to nearly the same score, reading a text at once and token by token
# may choose differently.
FLAGS = ("--max-model-len", "256", "--kv-cache-memory", "16MiB", "--threads", "1", "--dtype", "float32")
CHOSEN: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.0, "seed": 7, "top_p": 0.9},
    "penalized": {"temperature": 0.8, "seed": 3, "presence_penalty": 1.5, "repetition_penalty": 1.3},
    "stopped by a string": {"temperature": 0, "stop": ["the", "\n\n"], "min_tokens": 6},
}
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "To open a file, “naïve” is", "logprobs": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "What does os.path.join do?"}], "logprobs": True},
}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(*FLAGS, command=COMMAND, timeout_s=90) as running:
        yield running


def streamed(server: RunningServer, path: str, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, without what differs from one answer to the next."""
    options = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    reply = server.post(path, **body, **options)
    assert reply.status_code == 200, reply.text
    *events, last = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert last == "[DONE]"
    return [plain(json.loads(event)) for event in events]


def plain(chunk: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from answer to answer, and what only the first chunk or a warm cache has."""
    for name in ("id", "created", "prompt_token_ids"):
        chunk.pop(name, None)
    for choice in chunk["choices"]:
        choice.pop("prompt_token_ids", None)
        logprobs = choice.pop("logprobs") or {}
        choice["offsets"] = logprobs.get("text_offset")
        choice["tokens"] = logprobs.get("tokens") or [token["token"] for token in logprobs.get("content") or []]
    if chunk.get("usage"):
        del chunk["usage"]["prompt_tokens_details"]
    return chunk


def ids_of(chunk: dict[str, Any]) -> list[int]:
    return [id for choice in chunk["choices"] for id in choice.get("token_ids") or []]


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("kind", CHOSEN)
def test_it_goes_on_wherever_the_first_one_stopped(server: RunningServer, path: str, kind: str) -> None:
    body = {"model": "demo", "max_tokens": 14, **ENDPOINTS[path], **CHOSEN[kind]}
    whole = streamed(server, path, **body)
    given: list[int] = []
    for position, chunk in enumerate(whole[:-1], 1):
        if any(choice["finish_reason"] for choice in chunk["choices"]):
            break
        given += ids_of(chunk)
        if given and any(map(ids_of, whole[position:])):
            assert streamed(server, path, **body, resume_token_ids=given) == whole[position:]
    assert len(given) > 3


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"resume_token_ids": [5] * 8, "max_tokens": 8}, "the output is complete"),
        ({"resume_token_ids": [10**9]}, "does not exist"),
        ({"resume_token_ids": [5], "n": 2}, "n = 1"),
        ({"resume_token_ids": [5], "prompt": ["a", "b"]}, "one prompt"),
        ({"resume_token_ids": [5], "echo": True}, "echoed already"),
        ({"resume_token_ids": [5], "prompt_logprobs": 1}, "no prompt_logprobs"),
        ({"resume_token_ids": []}, "1 to 1048576 entries"),
        ({"resume_token_ids": [5] * 250, "max_tokens": None}, "max_tokens is 16"),
    ],
)
def test_what_leaves_nothing_to_go_on_with_is_refused(server: RunningServer, change: dict[str, Any], what: str) -> None:
    reply = server.post("/v1/completions", **{"prompt": "one two three four five six", **change})
    assert reply.status_code == 400
    assert what in reply.json()["error"]["message"]


def test_a_stop_string_in_what_was_given_is_an_end(server: RunningServer) -> None:
    body = {"prompt": "To open a file", "temperature": 0, "max_tokens": 8}
    choice = server.post("/v1/completions", **body, return_token_ids=True).json()["choices"][0]
    reply = server.post("/v1/completions", **body, resume_token_ids=choice["token_ids"][:6], stop=choice["text"][2:5])
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "output_complete"
    assert "stop string" in reply.json()["error"]["message"]
