"""The routes of the endpoints that are passed through, and the response to one request."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from powerband.dispatch.prefix import prefix_keys
from powerband.engines.base import CannotResume
from powerband.errors import PowerbandError
from powerband.gateway.accounts.accounts import Accounts
from powerband.gateway.accounts.keys import Key
from powerband.gateway.gateway import Gateway, ServedModel
from powerband.gateway.proxy.attempts import BuildRequest, EndpointMissing
from powerband.gateway.proxy.handler import ProxiedResponse, admit
from powerband.gateway.proxy.interfaces import ResponseState
from powerband.gateway.proxy.pass_through.endpoints import ENDPOINTS, RESPONSES, PassThroughEndpoint
from powerband.gateway.proxy.pass_through.errors import error_event
from powerband.gateway.proxy.pass_through.request import PassThroughRequest, lacks_endpoint
from powerband.gateway.proxy.pass_through.state import PassThroughState
from powerband.gateway.proxy.pass_through.stored import PreparedRequest, prepare
from powerband.gateway.request import GatewayRequest
from powerband.web.client_connection import while_connected

_OUTSIDE_RESULTS = 2  # the results are one level deeper


def make_routes(gateway: Gateway, accounts: Accounts) -> list[Route]:
    return [
        Route(path, partial(_take, gateway, accounts, endpoint), methods=["POST"])
        for endpoint in ENDPOINTS
        for path in endpoint.paths
    ]


async def _take(gateway: Gateway, accounts: Accounts, endpoint: PassThroughEndpoint, request: Request) -> Response:
    path = request.scope["path"]
    with while_connected(request.scope):
        if endpoint is RESPONSES:
            prepared = await prepare(gateway, accounts.responses, request)
        else:
            prepared = PreparedRequest(await gateway.read_body(request))
        client_request = await gateway.decode(
            request, prepared.data, lambda data: PassThroughRequest(data, endpoint, path)
        )
    served = gateway.served(client_request.fields.model)
    replicas = served.route.replicas
    if replicas and not any(one.adapter.may_offer(path) for one in replicas):
        raise lacks_endpoint(replicas[0], path)
    gateway_request, key = admit(gateway, served, request, client_request)
    if endpoint.limit:
        gateway_request.prefix_keys = prefix_keys(
            endpoint.name,
            client_request.prompt,
            gateway_request.tenant,
            client_request.prompt_salt + served.prefix_salt,
        )
    return PassThroughResponse(gateway, accounts, served, client_request, gateway_request, key, endpoint, prepared)


class PassThroughResponse(ProxiedResponse):
    """The response to one request. A stream that breaks off after its first event ends with an error event."""

    _buffered_depth: ClassVar[int] = _OUTSIDE_RESULTS

    def __init__(
        self,
        gateway: Gateway,
        accounts: Accounts,
        served: ServedModel,
        client_request: PassThroughRequest,
        request: GatewayRequest,
        key: Key | None,
        endpoint: PassThroughEndpoint,
        prepared: PreparedRequest,
    ) -> None:
        self._endpoint, self._is_private = endpoint, prepared.is_private
        self._make_state = partial(
            PassThroughState,
            client_request,
            endpoint,
            served.route.name,
            served.estimates,
            keeps_text=accounts.content.on and not prepared.is_private,
            kept=prepared.kept,
        )
        super().__init__(gateway, accounts, served, client_request, request, key)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super()._whole(scope, receive, send)
        except EndpointMissing as error:
            raise self._lacks_endpoint(error) from None

    async def _stream(self, send: Send) -> None:
        try:
            await super()._stream(send)
        except EndpointMissing as error:
            raise self._lacks_endpoint(error) from None

    def _lacks_endpoint(self, error: EndpointMissing) -> PowerbandError:
        replica = self._attempts.replica
        return error if replica is None else lacks_endpoint(replica, self._client_request.path, error.message)

    def _new_state(self) -> ResponseState:
        self._passed = self._make_state()
        return self._passed

    def _plan_resume(self) -> BuildRequest:
        raise CannotResume

    def _error_event(self, error: PowerbandError) -> bytes:
        return error_event(self._endpoint.name, error, self._passed.sequence_number)
