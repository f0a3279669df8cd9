"""Responses to /tokenize and /detokenize are buffered in the same memory budget as others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response

from powerband.gateway.accounts.limits import Limits
from powerband.gateway.proxy.token_routes import TokenCountRoutes
from powerband.gateway.routes import ReplicaAddress
from powerband.gateway.upstream.buffered_response import (
    LARGE_BYTES,
    ResponseBudget,
    ResponseBudgetExceeded,
    ResponseScanner,
)
from powerband.web.body import read_body

SAID = b'{"prompt":"' + b" " * (2 * LARGE_BYTES) + b'"}'


class Exchange:
    status = 200

    def __init__(self) -> None:
        self.pieces = [SAID[start : start + 65536] for start in range(0, len(SAID), 65536)]

    async def read(self) -> bytes:
        return self.pieces.pop(0) if self.pieces else b""


class Upstream:
    async def open(self, *_: Any, **__: Any) -> Exchange:
        return Exchange()

    def end(self, exchange: Exchange) -> None:
        pass


def routes(budget: ResponseBudget) -> TokenCountRoutes:
    replica = ReplicaAddress(id="r", url="http://r:1", model="m", engine="vllm")
    pool = SimpleNamespace(snapshot=lambda: SimpleNamespace(replicas=[SimpleNamespace(id="r", state="ready")]))
    served = SimpleNamespace(route=SimpleNamespace(name="m", replicas=[replica]), pool=pool)

    async def decoded(_request: Request, data: bytes, decode: Callable[[bytes], Any]) -> Any:
        return decode(data)

    gateway: Any = SimpleNamespace(
        read_body=lambda request: read_body(request, 1 << 20),
        decode=decoded,
        served=lambda _: served,
        upstream=Upstream(),
        response_budget=budget,
        response_scanner=ResponseScanner(),
    )
    accounts: Any = SimpleNamespace(
        limits=Limits({}),
        usage_log=SimpleNamespace(note=lambda _: None),
        responses=SimpleNamespace(on=False),
    )
    return TokenCountRoutes(gateway, accounts)


async def lookup(routes: TokenCountRoutes) -> Response:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b'{"model":"m","tokens":[1,2]}', "more_body": False}

    headers = [(b"content-type", b"application/json")]
    request = Request({"type": "http", "method": "POST", "path": "/", "headers": headers, "state": {}}, receive)
    request.state.key, request.state.request_id = None, "req_1"
    return await routes.detokenize(request)


def test_lookups_that_their_clients_do_not_read_are_refused_when_the_memory_is_used_up() -> None:
    async def test() -> None:
        budget = ResponseBudget(9 * LARGE_BYTES)
        asked = routes(budget)
        held = [await lookup(asked) for _ in range(2)]
        with pytest.raises(ResponseBudgetExceeded):
            await lookup(asked)
        assert budget.held.total() == 2 * len(SAID)

        async def send(_: Any) -> None:
            if budget.held.total() <= len(SAID):
                raise ConnectionResetError  # the client has left

        for response in held:
            with contextlib.suppress(ConnectionResetError):
                await response({"type": "http"}, None, send)  # type: ignore[arg-type]  # not called
        assert not budget.held

    asyncio.run(test())
