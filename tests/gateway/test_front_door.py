"""What a gateway says before it looks at a key, and what it passes on to replicas that can do more than ours."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from byte_replica import ByteReplica, answer, byte_replica
from gateways_for_tests import RunningGateway, running_gateway, until

PAGE = "http://localhost:5173"
CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}
USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
WHOLE = {
    "id": "x",
    "object": "chat.completion",
    "created": 1,
    "model": "inner",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
    "usage": USAGE,
}
CHUNK = {
    **WHOLE,
    "object": "chat.completion.chunk",
    "choices": [{"index": 0, "delta": {"content": "hello"}, "finish_reason": "stop"}],
}


async def play(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    ignored = "X-Ignored-Fields: keep_alive\r\n" if "keep_alive" in body else ""
    if body.get("stream"):
        events = f"data: {json.dumps(CHUNK)}\n\ndata: [DONE]\n\n"
        writer.write(answer(events, headers=ignored, kind="text/event-stream"))
    else:
        writer.write(answer(json.dumps(WHOLE), headers=ignored))


@pytest.fixture(scope="module")
def replica() -> Iterator[ByteReplica]:
    with byte_replica(play, paths=("/v1/models", "/health")) as found:
        yield found


@pytest.fixture(scope="module")
def gateway(replica: ByteReplica, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """Every request needs a key."""
    arguments = ("--auth=keys", f"--allowed-origins={PAGE}", f"--replica={replica.url}")
    with running_gateway(tmp_path_factory.mktemp("gateway"), *arguments) as running:
        until(lambda: set(running.replica_states().values()) == {"ready"})
        yield running


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}])
@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/admin/config", "This is a gateway. Send it to a replica"),
        (f"{CHAT}/", f"Did you mean '{CHAT}'?"),
        (f"{CHAT}/chat/completions", "The base URL for OpenAI's clients ends with /v1"),
        ("/chat/completions", f"Did you mean '{CHAT}'? The base URL for OpenAI's clients ends with /v1"),
        ("/models", "Did you mean '/v1/models'? The base URL"),
        ("/v1/v1/models", "Did you mean '/v1/models'?"),
        ("/v1/files", "Files cannot be used here."),
        ("/", "The base URL"),
        ("/docs", "The paths are listed in docs/api.md."),
        ("/admin", "The paths are listed"),
    ],
)
def test_an_unknown_path_is_not_found_whatever_the_key(
    gateway: RunningGateway, path: str, hint: str, headers: dict[str, str]
) -> None:
    response = gateway.http.get(path, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    assert hint in response.json()["error"]["message"]


def test_known_paths_ask_for_a_key(gateway: RunningGateway) -> None:
    for path in ("/v1/models", "/v1/models/inner", "/admin/routes", "/admin/keys", "/metrics"):
        assert gateway.http.get(path).status_code == 401
    assert gateway.http.put(CHAT).status_code == 401


def test_unknown_paths_are_counted(gateway: RunningGateway) -> None:
    def count() -> float:
        lines = gateway.admin.get("/metrics").text.splitlines()
        return float(next(line for line in lines if 'reason="not_found"' in line).rpartition(" ")[2])

    before = count()
    gateway.http.get("/nothing")
    assert count() == before + 1


def test_a_page_that_is_allowed_uses_the_gateway(gateway: RunningGateway) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    preflight = gateway.http.options(CHAT, headers={"Origin": PAGE, **asked})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-headers"] == "authorization,content-type"
    for body in (HI, {**HI, "stream": True}):
        answered = gateway.admin.post(CHAT, json=body, headers={"Origin": PAGE})
        assert "hello" in answered.text
        assert answered.headers["access-control-allow-origin"] == PAGE
    without_key = gateway.http.post(CHAT, json=HI, headers={"Origin": PAGE})
    assert (without_key.status_code, without_key.headers["access-control-allow-origin"]) == (401, PAGE)
    other = gateway.http.options(CHAT, headers={"Origin": "https://other.example", **asked})
    assert "access-control-allow-origin" not in other.headers


def test_without_the_setting_no_page_may_use_a_gateway(tmp_path: Path) -> None:
    with running_gateway(tmp_path) as gateway:
        response = gateway.http.options(CHAT, headers={"Origin": PAGE, "Access-Control-Request-Method": "POST"})
        assert response.status_code == 405
        assert gateway.http.post(CHAT, json=HI, headers={"Origin": PAGE}).status_code == 403
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("stream", [False, True])
def test_what_our_replicas_refuse_reaches_replicas_that_take_it(
    gateway: RunningGateway, replica: ByteReplica, stream: bool
) -> None:
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    body: dict[str, Any] = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "what is this?"}, image]},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "why"},
            {"role": "tool", "tool_call_id": "1", "content": "a cat"},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "auto",
        "response_format": {"type": "json_object"},
        "reasoning_effort": "low",
        "a_field_of_next_year": {"a": 1},
    }
    assert gateway.admin.post(CHAT, json={**body, "stream": stream}).status_code == 200
    arrived = replica.posts[-1]
    assert {name: arrived[name] for name in body} == body


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_replica_ignored_is_named_to_the_client(gateway: RunningGateway, stream: bool) -> None:
    named = gateway.admin.post(CHAT, json={**HI, "keep_alive": "5m", "stream": stream})
    assert named.headers["x-ignored-fields"] == "keep_alive"
    assert "x-ignored-fields" not in gateway.admin.post(CHAT, json={**HI, "stream": stream}).headers


def test_three_point_zero_is_three(gateway: RunningGateway, replica: ByteReplica) -> None:
    response = gateway.admin.post(CHAT, content=b'{"messages": [], "max_tokens": 3.0, "n": 1.00}', headers=JSON)
    assert response.status_code == 200
    assert type(replica.posts[-1]["max_tokens"]) is int
    refused = gateway.admin.post(CHAT, content=b'{"messages": [], "max_tokens": 3.5}', headers=JSON)
    assert refused.json()["error"]["message"].startswith("'max_tokens' is 3.5: it must be a whole number")


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("more", ["", "Connection: keep-alive\r\n"])
def test_a_client_of_http_1_0_gets_no_chunks(gateway: RunningGateway, stream: bool, more: str) -> None:
    """RFC 9112, 6.1: no Transfer-Encoding for HTTP/1.0; the end of the connection ends the stream."""
    url = httpx.URL(gateway.url)
    key = gateway.admin.headers["authorization"]
    body = json.dumps({**HI, "stream": stream}).encode()
    head = (
        f"POST {CHAT} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nAuthorization: {key}\r\n{more}"
    )
    with socket.create_connection((url.host, url.port or 80), timeout=30) as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answered = b"".join(iter(lambda: client.recv(65536), b""))
    lines, _, content = answered.partition(b"\r\n\r\n")
    assert lines.startswith(b"HTTP/1.1 200 ")
    assert b"transfer-encoding" not in lines.lower()
    if stream:
        assert content.startswith(b"data: {")
        assert content.endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(content)["choices"]
