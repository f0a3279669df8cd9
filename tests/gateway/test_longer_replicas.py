"""Replicas of different prompt lengths: a prompt that is too long for one of them goes on to a longer one.

A prompt's length is estimated from its bytes: digits, code and Chinese have more tokens than that.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from byte_replica import ByteReplica, answer, byte_replica
from gateways_for_tests import RunningGateway, running_gateway, until

MAX_SHORT, MAX_LONG = 1000, 100_000
TOO_LONG = "This model's maximum context length is {0} tokens. However, your request has {1} input tokens."
STREAM = {"stream": True}


class Replica:
    """A token is two characters. It reports an error as vLLM does (status 400), or as SGLang does (in the stream)."""

    def __init__(self, limit: int, *, in_stream: bool) -> None:
        self.limit, self.in_stream = limit, in_stream
        self.num_asked = 0

    async def play(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        self.num_asked += 1
        size = len(body["prompt"]) // 2
        choice = {"index": 0, "text": f"by {self.limit}", "finish_reason": "stop"}
        found: dict[str, Any] = {"id": "1", "model": "inner", "choices": [choice]}
        error = TOO_LONG.format(self.limit, size) if size > self.limit else ""
        error = "temperature must be positive" if body.get("temperature") == -1 else error
        if error:
            found = {"error": {"message": error, "type": "BadRequestError", "code": 400}}
        if body.get("stream") and (self.in_stream or not error):
            writer.write(answer(f"data: {json.dumps(found)}\n\ndata: [DONE]\n\n", kind="text/event-stream"))
        else:
            writer.write(answer(json.dumps(found), status=400 if error else 200))


@contextlib.contextmanager
def serving(folder: Path, *, in_stream: bool = False) -> Iterator[tuple[RunningGateway, list[Replica]]]:
    limits = (MAX_SHORT, MAX_LONG)
    replicas = [Replica(limit, in_stream=in_stream) for limit in limits]
    with contextlib.ExitStack() as stack:
        gateway = stack.enter_context(running_gateway(folder))
        found: list[ByteReplica] = [stack.enter_context(byte_replica(one.play)) for one in replicas]
        routes = [
            {"id": f"r{limit}", "url": one.url, "model": "inner", "engine": "openai", "max_prompt_tokens": limit}
            for limit, one in zip(limits, found, strict=True)
        ]
        made = {"revision": "1", "models": [{"name": "m", "replicas": routes}]}
        gateway.admin.put("/admin/routes", json=made).raise_for_status()
        until(lambda: set(gateway.replica_states().values()) == {"ready"})
        yield gateway, replicas


def body(num_tokens: int, **more: Any) -> dict[str, Any]:
    """Estimated at half of its tokens."""
    return {"model": "m", "prompt": "7" * (2 * num_tokens), "max_tokens": 5, **more}


@pytest.mark.parametrize("in_stream", [False, True], ids=["status", "in the stream"])
@pytest.mark.parametrize("more", [{}, STREAM], ids=["whole", "stream"])
def test_a_prompt_that_is_longer_than_estimated_goes_on_to_the_longer_replica(
    tmp_path: Path, more: dict[str, Any], in_stream: bool
) -> None:
    with serving(tmp_path, in_stream=in_stream) as (gateway, replicas):
        found = gateway.post("/v1/completions", body(MAX_SHORT, **more))
        assert f"by {MAX_SHORT}" in found.text
        found = gateway.post("/v1/completions", body(MAX_SHORT + 1, **more))
        assert (found.status_code, f"by {MAX_LONG}" in found.text) == (200, True)
        assert [one.num_asked for one in replicas] == [2, 1]


def test_what_the_longest_replica_rejects_goes_no_further(tmp_path: Path) -> None:
    with serving(tmp_path) as (gateway, replicas):
        found = gateway.post("/v1/completions", body(10, temperature=-1))
        assert (found.status_code, found.json()["error"]["message"]) == (400, "temperature must be positive")
        assert [one.num_asked for one in replicas] == [1, 1]


def test_without_a_longer_replica_the_client_gets_the_answer_of_the_short_one(tmp_path: Path) -> None:
    with serving(tmp_path) as (gateway, replicas):
        routes = gateway.admin.get("/admin/routes").json()["routes"]
        routes["models"][0]["replicas"][1]["draining"] = True
        gateway.admin.put("/admin/routes", json={**routes, "revision": "2"}).raise_for_status()
        found = gateway.post("/v1/completions", body(MAX_SHORT + 1))
        assert (found.status_code, f"length is {MAX_SHORT} tokens" in found.text) == (400, True)
        assert [one.num_asked for one in replicas] == [1, 0]
