"""All routes of a gateway, and its middleware: outermost request ids and error responses, then authentication."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from powerband.errors import PowerbandError
from powerband.gateway.accounts.accounts import Accounts
from powerband.gateway.accounts.auth import ApiKeyMiddleware
from powerband.gateway.accounts.routes import make_routes
from powerband.gateway.adapters import GatewayAdapterRoutes
from powerband.gateway.admin import GatewayAdminRoutes
from powerband.gateway.gateway import Gateway
from powerband.gateway.info_routes import InfoRoutes
from powerband.gateway.observability.metrics import GatewayMetrics
from powerband.gateway.proxy.handler import GenerationRoutes
from powerband.gateway.proxy.pass_through.routes import make_routes as pass_through_routes
from powerband.gateway.proxy.pass_through.stored import make_routes as stored_response_routes
from powerband.gateway.proxy.token_routes import TokenCountRoutes
from powerband.gateway.replica_metrics_routes import make_routes as scraping_routes
from powerband.gateway.upstream.adapters import LOAD_PATH, UNLOAD_PATH
from powerband.web.access import allow_pages
from powerband.web.anthropic import AnthropicErrorsMiddleware
from powerband.web.middleware import RequestIdMiddleware
from powerband.web.origins import parse_origins
from powerband.web.paths import KnownPathsMiddleware

_ELSEWHERE = dict.fromkeys(
    ("/admin/config", "/admin/pause", "/admin/resume", "/admin/reset_prefix_cache", "/startupz"),
    "This is a gateway. Send it to a replica: GET /admin/routes lists their URLs.",
)


def make_app(gateway: Gateway, accounts: Accounts, metrics: GatewayMetrics) -> ASGIApp:
    generation, admin = GenerationRoutes(gateway, accounts), GatewayAdminRoutes(gateway, accounts)
    adapters = GatewayAdapterRoutes(gateway, accounts)
    pages, tokens = InfoRoutes(gateway, accounts, metrics), TokenCountRoutes(gateway, accounts)
    routes = [
        Route("/v1/chat/completions", generation.chat, methods=["POST"]),
        Route("/v1/completions", generation.completions, methods=["POST"]),
        Route("/v1/models", pages.models, methods=["GET"]),
        Route("/v1/models/{name:path}", pages.model, methods=["GET"]),
        Route("/tokenize", tokens.tokenize, methods=["POST"]),
        Route("/detokenize", tokens.detokenize, methods=["POST"]),
        Route("/v1/messages/count_tokens", tokens.count_tokens, methods=["POST"]),
        Route("/v1/responses/input_tokens", tokens.input_tokens, methods=["POST"]),
        Route("/version", pages.version, methods=["GET"]),
        Route("/livez", pages.live, methods=["GET"]),
        Route("/readyz", pages.ready, methods=["GET"]),
        Route("/health", pages.ready, methods=["GET"]),
        Route("/metrics", pages.metrics, methods=["GET"]),
        Route("/admin/routes", admin.routes, methods=["GET"]),
        Route("/admin/routes", admin.put_routes, methods=["PUT"]),
        Route("/admin/routes/{name:path}", admin.put_model, methods=["PUT"]),
        Route("/admin/routes/{name:path}", admin.delete_model, methods=["DELETE"]),
        Route("/admin/records", admin.records, methods=["GET"]),
        Route("/admin/drain", admin.drain, methods=["POST"]),
        Route(LOAD_PATH, adapters.load, methods=["POST"]),
        Route(UNLOAD_PATH, adapters.unload, methods=["POST"]),
        *pass_through_routes(gateway, accounts),
        *stored_response_routes(accounts),
        *scraping_routes(gateway),
        *make_routes(accounts),
    ]
    router = Router(routes, redirect_slashes=False)
    settings = gateway.settings
    origins = parse_origins(settings.allowed_origins)
    closed = ApiKeyMiddleware(router, accounts, settings.auth, settings.host, origins=origins)
    known = KnownPathsMiddleware(closed, routes, "docs/api.md", _ELSEWHERE)
    counted = AnthropicErrorsMiddleware(RequestIdMiddleware(ErrorCounterMiddleware(known, metrics)))
    return allow_pages(counted, origins)


class ErrorCounterMiddleware:
    """Counts requests rejected before a `CompletedRequest` exists for them."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except (PowerbandError, HTTPException) as error:
            if "finished" not in scope["state"]:
                self._metrics.observe_rejection(error.code if isinstance(error, PowerbandError) else "no_such_path")
            raise
