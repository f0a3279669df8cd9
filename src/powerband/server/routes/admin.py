"""Administration, under /admin: drain, pause, resume, forget cached prefixes, show the settings in effect."""

from __future__ import annotations

from dataclasses import asdict

from starlette.requests import Request
from starlette.responses import Response

from powerband.server.replica import ServerState
from powerband.server.replies import AdminState, EffectiveConfig
from powerband.web.access import refuse_browsers
from powerband.web.errors import json_response


class AdminRoutes:
    def __init__(self, replica: ServerState) -> None:
        self._replica = replica

    async def drain(self, request: Request) -> Response:
        """Accept no new requests; running ones continue. /readyz answers 503 from now on."""
        refuse_browsers(request)
        self._replica.draining = True
        return self._state()

    async def pause(self, request: Request) -> Response:
        """Schedule nothing more. Requests are still accepted, and wait."""
        refuse_browsers(request)
        await self._replica.engine.call("pause")
        self._replica.paused = True
        return self._state()

    async def resume(self, request: Request) -> Response:
        """End pause and drain."""
        refuse_browsers(request)
        await self._replica.engine.call("resume")
        self._replica.paused = self._replica.draining = False
        return self._state()

    async def reset_prefix_cache(self, request: Request) -> Response:
        refuse_browsers(request)
        await self._replica.engine.call("reset_prefix_cache")
        return self._state()

    async def config(self, _request: Request) -> Response:
        server = asdict(self._replica.settings)
        server["api_key"] = "set" if server["api_key"] else None
        return json_response(EffectiveConfig(engine=self._replica.model.info.config, server=server))

    def _state(self) -> Response:
        replica = self._replica
        return json_response(
            AdminState(draining=replica.draining, paused=replica.paused, running_http_requests=replica.num_active)
        )
