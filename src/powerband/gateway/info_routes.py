"""Routes for information: models, health probes, version, metrics."""

from __future__ import annotations

import asyncio
import time
from importlib.metadata import version
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from powerband.gateway.accounts.accounts import Accounts
from powerband.gateway.gateway import Gateway, ServedModel
from powerband.gateway.observability.metrics import GatewayMetrics, GaugeSnapshot
from powerband.web.errors import HttpError, json_response


class InfoRoutes:
    def __init__(self, gateway: Gateway, accounts: Accounts, metrics: GatewayMetrics) -> None:
        self._gateway = gateway
        self._accounts = accounts
        self._metrics = metrics
        self._created_s = int(time.time())

    async def live(self, _request: Request) -> Response:
        return json_response({"status": "ok"})

    async def ready(self, _request: Request) -> Response:
        """200 if some model has a ready replica."""
        reason = self._gateway.unready()
        if reason:
            raise HttpError(503, "not_ready", reason)
        return json_response({"status": "ok"})

    async def version(self, _request: Request) -> Response:
        return json_response({"version": version("powerband")})

    async def models(self, _request: Request) -> Response:
        """All served names, including aliases, and the adapters that replicas list."""
        names = (*self._gateway.names(), *sorted(self._gateway.adapters()))
        served = [self._gateway.served(name) for name in names]
        cards = await asyncio.gather(*map(self._card, names, served))
        return json_response({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        return json_response(await self._card(name, self._gateway.served(name)))

    async def metrics(self, _request: Request) -> Response:
        figures = self._accounts.figures()
        moment = GaugeSnapshot(
            pools=self._gateway.snapshots(),
            in_flight=self._gateway.num_active,
            ledger_rows_buffered=figures.usage_waiting,
            ledger_rows_lost=figures.usage_dropped,
            ledger_failing_s=figures.failing_s,
        )
        parts = []
        for part in self._metrics.parts(moment):
            parts.append(part)
            await asyncio.sleep(0)
        return Response(b"".join(parts), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _card(self, name: str, served: ServedModel) -> dict[str, Any]:
        """With the largest context of the model's replicas, as they list it; without, where none does."""
        card: dict[str, Any] = {"id": name, "object": "model", "created": self._created_s, "owned_by": "powerband"}
        if name != served.route.name:
            card["root"] = served.route.name
        if served.adapter:
            card["parent"] = served.pool.model
        context = await served.context_lengths.largest(served.route.replicas, self._gateway.upstream)
        if context is not None:
            card["max_model_len"] = context
        return card
