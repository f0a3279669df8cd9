"""Probes: /livez asks for this process, /startupz for the start, /readyz and /health whether steps advance."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from powerband.server.replica import ServerState
from powerband.server.replies import Health
from powerband.web.errors import HttpError, json_response


class HealthRoutes:
    def __init__(self, replica: ServerState) -> None:
        self._replica = replica

    async def live(self, _request: Request) -> Response:
        return json_response(Health(status="ok"))

    async def started(self, _request: Request) -> Response:
        if not self._replica.started:
            raise HttpError(503, "starting", f"The engine is starting ({self._replica.phase}).")
        return json_response(self._health())

    async def ready(self, _request: Request) -> Response:
        reason = self._replica.unready()
        if reason:
            raise HttpError(503, "not_ready", reason)
        return json_response(self._health())

    async def metrics(self, _request: Request) -> Response:
        self._replica.metrics.num_engine_restarts = self._replica.engine.num_restarts
        return Response(self._replica.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def _health(self) -> Health:
        engine, last_exit = self._replica.engine.health(), self._replica.engine.last_exit
        return Health(
            status="ok",
            steps=engine.steps,
            heartbeat_age_s=engine.heartbeat_age_s,
            engine_restarts=self._replica.engine.num_restarts,
            engine_exit=last_exit.reason if last_exit is not None else "",
            engine_exit_code=last_exit.code if last_exit is not None else None,
        )
