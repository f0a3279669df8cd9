"""/v1/models and /version: what is served, and by which version."""

from __future__ import annotations

from importlib.metadata import version

from starlette.requests import Request
from starlette.responses import Response

from powerband.server.replica import ServerState
from powerband.server.replies import ModelCard, ModelList, Version
from powerband.web.errors import json_response


class ModelRoutes:
    def __init__(self, replica: ServerState) -> None:
        self._replica = replica

    async def models(self, _request: Request) -> Response:
        return json_response(ModelList(data=[self._card()]))

    async def model(self, request: Request) -> Response:
        self._replica.check_name(request.path_params["name"])
        return json_response(self._card())

    async def version(self, _request: Request) -> Response:
        return json_response(Version(version("powerband")))

    def _card(self) -> ModelCard:
        model = self._replica.model
        return ModelCard(id=self._replica.name, created=model.created_s, max_model_len=model.info.max_model_len)
