"""A stream whose replica is gone after any of its events goes on at another one, and its client cannot tell.

The replica is real, with the demo model; what comes from it is cut, and told on, by the gateway's own parts.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from gateways_for_tests import until
from test_failover_real import replica

from powerband.core.request import OUTPUT_COMPLETE
from powerband.gateway.proxy.client_request import PATHS, ClientRequest
from powerband.gateway.proxy.resume import Resumer
from powerband.gateway.proxy.stream_state import StreamState
from powerband.gateway.request import ANONYMOUS, Endpoint
from powerband.gateway.routes import ReplicaAddress
from powerband.gateway.upstream.client import UpstreamClient
from powerband.gateway.upstream.errors import InvalidUpstreamRequest
from powerband.openai.errors import read_error
from powerband.openai.events import END, EventReader

HTTP = httpx.Client(timeout=60)
TEXT: dict[str, Any] = {"model": "demo", "prompt": "def main():", "max_tokens": 14, "stream": True}
CHAT: dict[str, Any] = {
    **{name: value for name, value in TEXT.items() if name != "prompt"},
    "messages": [{"role": "user", "content": "What is a list?"}],
}
SAMPLED = {"temperature": 1.2, "top_p": 0.9, "seed": 7, "ignore_eos": True}
IDS = {"return_token_ids": True}
USAGE = {"stream_options": {"include_usage": True}}
PENALISED = {"repetition_penalty": 1.3, "presence_penalty": 0.9, "frequency_penalty": 0.7}
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "size": {"type": "integer", "maximum": 99}},
    "required": ["colour", "size"],
    "additionalProperties": False,
}
FORM = {"response_format": {"type": "json_schema", "json_schema": {"name": "shirt", "schema": SCHEMA}}}
HALVES = {"allowed_token_ids": [*range(128, 256)], "max_tokens": 20}  # bytes of letters that have several

REQUESTS: dict[str, tuple[Endpoint, dict[str, Any]]] = {
    "greedy": ("completions", {**TEXT, "temperature": 0, **USAGE}),
    "seeded": ("completions", {**TEXT, **SAMPLED, **IDS}),
    "penalised": ("chat", {**CHAT, **SAMPLED, **PENALISED, **USAGE}),
    "greedy and penalised": ("completions", {**TEXT, **PENALISED, "temperature": 0, "ignore_eos": True, **IDS}),
    "with stop strings": ("completions", {**TEXT, **SAMPLED, "max_tokens": 40, "stop": ["zzzz", "ely"]}),
    "with long stop strings": ("chat", {**CHAT, **SAMPLED, "max_tokens": 20, "stop": ["never, ever, at all"], **IDS}),
    "with log-probabilities": ("completions", {**TEXT, **SAMPLED, "logprobs": 2}),
    "chat with log-probabilities": ("chat", {**CHAT, **SAMPLED, "logprobs": True, "top_logprobs": 2}),
    "echoed": ("completions", {**TEXT, **SAMPLED, "echo": True, **USAGE}),
    "half letters": ("completions", {**TEXT, **SAMPLED, **HALVES}),
    "half letters and stop strings": ("chat", {**CHAT, **SAMPLED, **HALVES, "stop": ["\ufffd\ufffd\ufffd\ufffd"]}),
    "until its own end": ("chat", {**CHAT, "max_tokens": 60, "temperature": 0}),
    "by a schema": ("chat", {**CHAT, **FORM, "max_tokens": 60, "temperature": 1.2, "seed": 7, **USAGE}),
    "by a regular expression": ("completions", {**TEXT, "structured_outputs": {"regex": "(ab|cd){6}"}, "seed": 7}),
    "with a least length": ("completions", {**TEXT, **SAMPLED, "min_tokens": 12, "stop": ["e"], **IDS}),
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with replica(tmp_path_factory.mktemp("replica")) as (url, process):

        def is_ready() -> bool:
            assert process.poll() is None
            try:
                return httpx.get(f"{url}/readyz").status_code == 200
            except httpx.TransportError:
                return False

        until(is_ready, 60)
        yield url


def asked(url: str, path: str, body: bytes) -> list[bytes]:
    """The data of all events. Raises InvalidUpstreamRequest."""
    answer = HTTP.post(f"{url}{path}", content=body, headers={"Content-Type": "application/json"})
    if answer.status_code != 200:
        raise InvalidUpstreamRequest(read_error(answer.content), answer.status_code)
    return EventReader().feed(answer.content)


def joined(events: list[bytes], size: int) -> list[bytes]:
    """Events with the tokens of `size` events each, as a server writes them that is behind."""
    found: list[bytes] = []
    group: list[dict[str, Any]] = []

    def close() -> None:
        if group:
            value = group[0]
            for other in group[1:]:
                _join(value["choices"][0], other["choices"][0])
            found.append(json.dumps(value).encode())
            group.clear()

    for data in events:
        value = {} if data == END else json.loads(data)
        choices = value.get("choices") or [{"finish_reason": "none"}]
        if choices[0].get("finish_reason") or "role" in choices[0].get("delta", {}) or "logprobs" in value:
            close()
            found.append(data)
        else:
            group.append(value)
            if len(group) == size:
                close()
    close()
    return found


def _join(choice: dict[str, Any], other: dict[str, Any]) -> None:
    choice["token_ids"] += other["token_ids"]
    if "text" in choice:
        choice["text"] += other["text"]
    else:
        choice["delta"]["content"] += other["delta"]["content"]
    for name, values in (other.get("logprobs") or {}).items():
        if values is not None:
            choice["logprobs"][name] += values


class Client:
    """What a client makes of what it reads."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {"text": "", "ids": [], "logprobs": [], "roles": 0, "reason": [], "usage": None}
        self.seen |= {"reasoning": "", "calls": [], "reasoning_tokens": None}
        self.names: set[tuple[Any, ...]] = set()

    def read(self, told: bytes) -> None:
        for data in EventReader().feed(told) if told else ():
            if data == END:
                continue
            value = json.loads(data)
            self.names.add((value["id"], value["created"], value["model"], value["object"]))
            for choice in value["choices"]:
                self._read_choice(choice)
            usage = value.get("usage") or {}  # what was cached may differ
            self.seen["usage"] = usage.get("total_tokens") or self.seen["usage"]
            details = usage.get("completion_tokens_details") or {}
            self.seen["reasoning_tokens"] = details.get("reasoning_tokens", self.seen["reasoning_tokens"])

    def _read_choice(self, choice: dict[str, Any]) -> None:
        seen, delta = self.seen, choice.get("delta", {})
        seen["text"] += choice.get("text") or delta.get("content") or ""
        seen["ids"] += choice.get("token_ids") or []
        seen["roles"] += "role" in delta
        seen["reasoning"] += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls") or ():
            if "id" in call:  # random, and sent once, with the name
                assert call["index"] == len(seen["calls"])
                seen["calls"].append([call["function"]["name"], ""])
            seen["calls"][call["index"]][1] += call["function"].get("arguments", "")
        seen["reason"] += [choice["finish_reason"]] if choice["finish_reason"] else []
        logprobs = choice.get("logprobs") or {}
        names = ("tokens", "token_logprobs", "text_offset")
        seen["logprobs"] += zip(*(logprobs.get(name) or () for name in names), strict=True)
        seen["logprobs"] += [(one["token"], one["logprob"], one["bytes"]) for one in logprobs.get("content") or ()]


def is_close(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two clients have seen the same; a prompt that is read at once rounds a little differently."""
    pairs = list(zip(one["logprobs"], other["logprobs"], strict=True))
    return (
        {**one, "logprobs": 0} == {**other, "logprobs": 0}
        and all((a[0], a[2]) == (b[0], b[2]) for a, b in pairs)
        and all(a[1] == pytest.approx(b[1], abs=1e-3) for a, b in pairs)
    )


def told(events: list[bytes], state: StreamState, client: Client, cut: int | None = None) -> None:
    for data in events[:cut]:
        if data != END:
            client.read(state.process_event(data, 0.0))


def cut_and_resumed(
    url: str, endpoint: Endpoint, body: dict[str, Any], size: int, every: int = 1
) -> tuple[Client, list[Client], int]:
    """Clients of the whole stream, and of the stream cut after each of its events, then cut again two events on.

    every: cut only after the last of so many events.
    """
    address = ReplicaAddress(id="r", url=url, model="demo")
    client_request = ClientRequest(json.dumps(body).encode(), endpoint)
    events = joined(asked(url, PATHS[endpoint], client_request.upstream_body(address, ANONYMOUS)), size)
    whole = Client()
    state = StreamState(client_request, "demo")
    state.begin(address)
    told(events, state, whole)
    assert state.is_finished
    found = []
    assert events[-1] == END
    cuts = range(len(events) - 2, 0, -every)[::-1]
    for cut in cuts:
        client, state = Client(), StreamState(client_request, "demo")
        resumer = Resumer(client_request, state, UpstreamClient(), ANONYMOUS)
        state.begin(address)
        told(events, state, client, cut)
        for end in (2, None):
            if state.is_finished:
                break
            path, plan = asyncio.run(resumer.plan(address))
            try:
                rest = asked(url, path, plan)
            except InvalidUpstreamRequest as problem:
                if problem.code != OUTPUT_COMPLETE:
                    raise
                client.read(state.finish())
                break
            state.begin(address)
            told(rest, state, client, end)
        client.read(state.final_events())
        found.append(client)
    return whole, found, len(cuts)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("kind", REQUESTS)
def test_a_stream_cut_after_any_event_goes_on_as_if_it_had_not_been(url: str, kind: str, size: int) -> None:
    endpoint, body = REQUESTS[kind]
    whole, found, num_cuts = cut_and_resumed(url, endpoint, body, size)
    assert num_cuts > 3
    for number, client in enumerate(found, 1):
        assert is_close(client.seen, whole.seen), f"cut after {number} events"
        assert len(client.names) == 1


@pytest.mark.parametrize("size", [1, 4])
def test_a_stream_that_its_client_had_resumed_goes_on_after_what_the_client_has(url: str, size: int) -> None:
    body = {**TEXT, **SAMPLED, **IDS, "max_tokens": 20}
    choices = [json.loads(data)["choices"] for data in asked(url, PATHS["completions"], json.dumps(body).encode())[:-1]]
    ids = [id for (choice,) in choices for id in choice["token_ids"]]
    whole, found, _ = cut_and_resumed(url, "completions", {**body, "resume_token_ids": ids[:7]}, size)
    assert ids[:7] + whole.seen["ids"] == ids
    for number, client in enumerate(found, 1):
        assert is_close(client.seen, whole.seen), f"cut after {number} events"
