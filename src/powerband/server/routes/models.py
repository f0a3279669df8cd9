"""/v1/models and /version: what is served, the model and its adapters, and by which version."""

from __future__ import annotations

from importlib.metadata import version

from starlette.requests import Request
from starlette.responses import Response

from powerband.server.adapters import ServedAdapter
from powerband.server.replica import ServerState
from powerband.server.replies import ModelCard, ModelList, Version
from powerband.web.errors import json_response


class ModelRoutes:
    def __init__(self, replica: ServerState) -> None:
        self._replica = replica

    async def models(self, _request: Request) -> Response:
        cards = [model_card(self._replica), *(model_card(self._replica, one) for one in self._replica.adapters.all())]
        return json_response(ModelList(data=cards))

    async def model(self, request: Request) -> Response:
        adapter = self._replica.adapter(request.path_params["name"])
        return json_response(model_card(self._replica, adapter))

    async def version(self, _request: Request) -> Response:
        return json_response(Version(version("powerband")))


def model_card(replica: ServerState, adapter: ServedAdapter | None = None) -> ModelCard:
    """The model's, or an adapter's."""
    model = replica.model
    length = model.info.max_model_len
    if adapter is None:
        return ModelCard(id=replica.name, created=model.created_s, max_model_len=length)
    name, created_s = adapter.info.name, adapter.created_s
    return ModelCard(id=name, created=created_s, max_model_len=length, parent=replica.name)
