"""Before a load: which context a server says that it has, whoever's server it is."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from powerband.bench.client import probe
from powerband.bench.client.messages import ServerAddress
from powerband.bench.client.probe import ServerInfo, find_server
from powerband.http_client.request import Response


def found(pages: dict[str, Any]) -> ServerInfo:
    """What is found of a server with these pages."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
        body = json.dumps(pages.get(path)).encode()
        status = "200 OK" if path in pages else "404 Not Found"
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    async def run() -> ServerInfo:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        base = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            return (await find_server(ServerAddress(base=base, endpoint="chat", model="")))[1]
        finally:
            server.close()

    return asyncio.run(run())


def listed(**card: object) -> dict[str, Any]:
    return {"/v1/models": {"object": "list", "data": [{"id": "m", "object": "model", **card}]}}


@pytest.mark.parametrize(
    ("pages", "context"),
    [
        (listed(owned_by="vllm", max_model_len=8192), 8192),
        (listed(owned_by="sglang", max_model_len=4096), 4096),
        (listed(context_length=131072), 131072),
        (listed(context_window=32768, owned_by="Meta"), 32768),
        (listed(max_context_length=16384), 16384),
        (listed(max_model_len=None, context_length="8k"), None),
        (listed(max_model_len=True), None),
        (listed(owned_by="openai"), None),
        (
            listed(owned_by="llamacpp", meta={"n_ctx_train": 131072})
            | {"/props": {"default_generation_settings": {"n_ctx": 4096}}},
            4096,
        ),
        (listed(owned_by="llamacpp"), None),
        (listed(owned_by="llamacpp") | {"/props": ["nonsense"]}, None),
    ],
)
def test_the_context_of_a_server(pages: dict[str, Any], context: int | None) -> None:
    assert found(pages).max_model_len == context


@pytest.mark.parametrize(
    ("tokens", "words_per_token", "extra"),
    [
        ((32, 288), 1.0, 0),
        ((33, 288), 1.0, 1),  # a first word of two tokens
        ((32, 291), 1.0, 0),
        ((44, 300), 1.0, 12),  # a chat template
        ((44, 428), 1 / 1.5, 0),
        ((0, 0), 1.0, 0),  # it does not count
    ],
)
def test_words_are_fitted_to_the_servers_tokens(
    tokens: tuple[int, int], words_per_token: float, extra: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter(tokens)

    async def post(*_arguments: object) -> Response:
        return Response(200, json.dumps({"usage": {"prompt_tokens": next(counts)}}).encode())

    monkeypatch.setattr(probe, "post", post)
    target = ServerAddress(base="http://test:1", endpoint="chat", model="m", max_model_len=2048)
    fitted = asyncio.run(probe.calibrate_prompt_words(target))
    assert fitted.words_per_token == pytest.approx(words_per_token)
    assert fitted.extra_prompt_tokens == extra
