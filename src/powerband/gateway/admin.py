"""Admin routes for routing: models and replicas, recently completed requests, and draining replicas."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from powerband.errors import InvalidRequest, PowerbandError, UsageError
from powerband.gateway.accounts.accounts import Accounts, actor_of
from powerband.gateway.gateway import Gateway
from powerband.gateway.routes import ModelRoute, Routes
from powerband.spec.yaml_codec import as_record
from powerband.web.access import refuse_browsers
from powerband.web.body import decode, read_body
from powerband.web.errors import json_response

logger = logging.getLogger(__name__)
_HIDDEN = "set"  # shown in place of a replica's API key
_RECORDS_PER_TURN = 50  # encoding them takes about a quarter of a millisecond


class _Drain(msgspec.Struct, forbid_unknown_fields=True):
    replica: str
    draining: bool = True  # false: send it requests again


class GatewayAdminRoutes:
    def __init__(self, gateway: Gateway, accounts: Accounts) -> None:
        self._gateway = gateway
        self._accounts = accounts

    async def routes(self, request: Request) -> Response:
        """The routes, and the state of each pool."""
        refuse_browsers(request)
        return json_response(self._state())

    async def put_routes(self, request: Request) -> Response:
        """Replace all routes. The same revision again changes nothing."""
        refuse_browsers(request)
        data = await read_body(request, self._gateway.settings.max_body_bytes)
        try:
            routes = Routes.from_dict(decode(data, dict[str, Any]))
        except UsageError as problem:
            raise InvalidRequest(problem.message, hint=problem.hint, param=problem.param) from None
        if routes != self._gateway.routes and (not routes.revision or routes.revision != self._gateway.routes.revision):
            self._gateway.set_routes(routes)
            self._note(request, "routes", {"revision": routes.revision, "models": [one.name for one in routes.models]})
        return json_response(self._state())

    async def put_model(self, request: Request) -> Response:
        """Add or replace the route of one model; the others stay. The same revision again changes nothing."""
        refuse_browsers(request)
        name, routes = request.path_params["name"], self._gateway.routes
        data = await read_body(request, self._gateway.settings.max_body_bytes)
        try:
            model = ModelRoute.from_dict({"name": name, **decode(data, dict[str, Any])})
            if model.name != name:
                raise UsageError(f"The path names the model {name[:80]!r}, the body {model.name[:80]!r}.", param="name")
            known = routes.model(name)
            if model != known and not (known is not None and model.revision and model.revision == known.revision):
                self._gateway.set_routes(routes.with_model(model))
                self._note(request, "routes", {"model": name, "revision": model.revision})
        except UsageError as problem:
            raise InvalidRequest(problem.message, hint=problem.hint, param=problem.param) from None
        return json_response(self._state())

    async def delete_model(self, request: Request) -> Response:
        """Remove the route of one model; its running requests finish. Without such a model, nothing changes."""
        refuse_browsers(request)
        name, routes = request.path_params["name"], self._gateway.routes
        if routes.model(name) is not None:
            self._gateway.set_routes(routes.without_model(name))
            self._note(request, "routes", {"model": name, "removed": True})
        return json_response(self._state())

    async def drain(self, request: Request) -> Response:
        """Send a replica no new requests; its running ones finish."""
        refuse_browsers(request)
        asked = decode(await read_body(request, self._gateway.settings.max_body_bytes), _Drain)
        self._gateway.drain_replica(asked.replica, draining=asked.draining)
        self._note(request, "drain", {"replica": asked.replica, "draining": asked.draining})
        return json_response(self._state())

    async def records(self, request: Request) -> Response:
        """Requests that completed after number `after`, oldest first, and the number for the next call."""
        refuse_browsers(request)
        asked = request.query_params.get("after", "0")
        if not asked.isascii() or not asked.isdigit() or len(asked) > 18:
            raise InvalidRequest(f"'after' is {asked[:40]!r}; it must be a number.", param="after")
        recent = self._gateway.recent
        found = recent.after(int(asked))
        last = found[-1].sequence if found else min(int(asked), recent.last)
        encoded: list[bytes] = []
        for start in range(0, len(found), _RECORDS_PER_TURN):
            encoded += [msgspec.json.encode(one) for one in found[start : start + _RECORDS_PER_TURN]]
            await asyncio.sleep(0)  # let other tasks run
        head = b'{"next":%d,"newest":%d,"records":[' % (last, recent.last)
        return Response(head + b",".join(encoded) + b"]}", media_type="application/json")

    def _note(self, request: Request, action: str, what: dict[str, Any]) -> None:
        """Write to the audit log. If that fails, the action stays in effect: routing must not depend on the disk."""
        try:
            self._accounts.audit(actor_of(request), action, what)
        except PowerbandError as problem:
            logger.warning("Could not write to the audit log: %s %s (%s)", action, what, problem)

    def _state(self) -> dict[str, Any]:
        routes = self._gateway.routes.as_dict()
        for model in routes["models"]:
            for replica in model["replicas"]:
                replica["api_key"] = _HIDDEN if replica["api_key"] else ""
        return {"routes": routes, "pools": as_record(self._gateway.snapshots(), complete=True)}
