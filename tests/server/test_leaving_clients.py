"""A request ends when its client leaves, wherever it waits; administration goes on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from powerband.server.app import make_app, operations
from powerband.server.replica import ServerState
from powerband.server.settings import ServerSettings
from powerband.spec.settings import EngineSettings
from powerband.web.client_connection import ClientConnection, set_client_connection


async def never(*_: Any) -> Any:
    await asyncio.Event().wait()


async def leave(path: str) -> bool:
    """A client sends a request, and leaves while that waits. Returns whether the request ends."""
    app = make_app(ServerState(EngineSettings(), ServerSettings()))
    connection = ClientConnection(None)  # type: ignore[arg-type]  # nothing is written to it
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"9")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b"", "state": {}}
    set_client_connection(scope, connection)
    running = asyncio.create_task(app(scope, never, never))
    await asyncio.sleep(0.01)
    connection.lost()
    done, _ = await asyncio.wait((running,), timeout=0.2)
    running.cancel()
    return bool(done)


def test_all_but_administration_ends_with_its_client() -> None:
    async def test() -> None:
        table = operations(ServerState(EngineSettings(), ServerSettings()))
        paths = {one.path for one in table if one.body is not None}
        outlive = {path for path in paths if not await leave(path)}
        assert outlive == {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}

    asyncio.run(test())


@pytest.mark.parametrize("path", ["/tokenize", "/v1/messages/count_tokens", "/v1/responses/input_tokens"])
def test_counting_tokens_ends_with_its_client(path: str) -> None:
    assert asyncio.run(leave(path))
