"""/v1/load_lora_adapter and /v1/unload_lora_adapter, vLLM's: administration, so that web pages are refused."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from powerband.errors import InvalidRequest
from powerband.server.protocol import LoadAdapterRequest, UnloadAdapterRequest
from powerband.server.replica import ServerState
from powerband.server.replies import UnloadedAdapter
from powerband.server.routes.models import model_card
from powerband.web.access import refuse_browsers
from powerband.web.errors import json_response


class AdapterRoutes:
    def __init__(self, replica: ServerState) -> None:
        self._replica = replica

    async def load(self, request: Request) -> Response:
        """Load an adapter and serve it under its name; answered when it is ready. Requests go on meanwhile."""
        refuse_browsers(request)
        replica = self._replica
        body = await replica.read(request, LoadAdapterRequest)
        replica.accept()
        if body.lora_name == replica.name:
            raise InvalidRequest(f"{body.lora_name!r} is the model's name.", hint="Choose another.", param="lora_name")
        adapter = await replica.adapters.load(
            replica.engine, body.lora_name, body.lora_path, replace=bool(body.load_inplace)
        )
        return json_response(model_card(replica, adapter))

    async def unload(self, request: Request) -> Response:
        """Take no more requests for an adapter. Those that run end with it."""
        refuse_browsers(request)
        body = await self._replica.read(request, UnloadAdapterRequest)
        await self._replica.adapters.unload(self._replica.engine, body.lora_name)
        return json_response(UnloadedAdapter(id=body.lora_name))
