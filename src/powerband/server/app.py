"""All routes of a replica, in one table from which the application and its OpenAPI description are both made."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from powerband.server.auth import BearerTokenMiddleware, server_key
from powerband.server.messages.objects import InputTokens, MessageEvent, MessageObject
from powerband.server.messages.requests import CountTokensRequest, MessagesRequest
from powerband.server.openapi import Operation, describe
from powerband.server.pooling.protocol import (
    EmbeddingList,
    EmbeddingRequest,
    Ranking,
    RerankRequest,
    ScoreList,
    ScoreRequest,
)
from powerband.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadAdapterRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
)
from powerband.server.replica import ServerState
from powerband.server.replies import (
    AdminState,
    ChatChunk,
    ChatCompletion,
    Completion,
    Detokenized,
    EffectiveConfig,
    Health,
    ModelCard,
    ModelList,
    Tokenized,
    UnloadedAdapter,
    Version,
)
from powerband.server.responses.objects import InputTokenCount, ResponseEvent, ResponseObject
from powerband.server.responses.requests import ResponsesRequest
from powerband.server.routes.adapters import AdapterRoutes
from powerband.server.routes.admin import AdminRoutes
from powerband.server.routes.chat import ChatRoutes
from powerband.server.routes.completions import CompletionRoutes
from powerband.server.routes.embeddings import EmbeddingRoutes
from powerband.server.routes.health import HealthRoutes
from powerband.server.routes.messages import MessagesRoutes
from powerband.server.routes.models import ModelRoutes
from powerband.server.routes.responses import ResponsesRoutes
from powerband.server.routes.scores import ScoreRoutes
from powerband.server.routes.tokens import TokenRoutes
from powerband.web.access import allow_pages
from powerband.web.anthropic import AnthropicErrorBody, AnthropicErrorsMiddleware
from powerband.web.client_connection import while_connected
from powerband.web.errors import json_response
from powerband.web.middleware import RequestIdMiddleware
from powerband.web.origins import parse_origins
from powerband.web.paths import KnownPathsMiddleware

_TAKEN = (400, 404, 408, 413, 415, 503)
_WORK = (*_TAKEN, 429)


def operations(replica: ServerState) -> list[Operation]:
    tokens = TokenRoutes(replica)
    health, models, admin = HealthRoutes(replica), ModelRoutes(replica), AdminRoutes(replica)
    return [
        *_openai(replica),
        *_anthropic(replica),
        *_pooling(replica),
        Operation("POST", "/tokenize", tokens.tokenize, "Text to token ids", Tokenized, TokenizeRequest, None, _TAKEN),
        Operation(
            "POST", "/detokenize", tokens.detokenize, "Token ids to text", Detokenized, DetokenizeRequest, None, _TAKEN
        ),
        Operation("GET", "/v1/models", models.models, "The model and its adapters", ModelList, errors=(503,)),
        Operation("GET", "/v1/models/{name:path}", models.model, "One of them", ModelCard, errors=(404, 503)),
        *_administering_adapters(AdapterRoutes(replica)),
        Operation("GET", "/version", models.version, "The server's version", Version),
        Operation("GET", "/livez", health.live, "Is the process there?", Health),
        Operation("GET", "/startupz", health.started, "Has the engine started?", Health, errors=(503,)),
        Operation("GET", "/readyz", health.ready, "Do steps advance?", Health, errors=(503,)),
        Operation("GET", "/health", health.ready, "The same as /readyz", Health, errors=(503,)),
        Operation("GET", "/metrics", health.metrics, "Figures for Prometheus"),
        Operation("GET", "/admin/config", admin.config, "Settings in effect", EffectiveConfig, errors=(503,)),
        *(
            Operation("POST", f"/admin/{name}", handler, summary, AdminState, errors=(503,))
            for name, handler, summary in (
                ("drain", admin.drain, "Take no new requests"),
                ("pause", admin.pause, "Schedule nothing more"),
                ("resume", admin.resume, "End pause and drain"),
                ("reset_prefix_cache", admin.reset_prefix_cache, "Forget cached prefixes"),
            )
        ),
    ]


def _administering_adapters(adapters: AdapterRoutes) -> list[Operation]:
    return [
        Operation(
            "POST",
            "/v1/load_lora_adapter",
            adapters.load,
            "Load a LoRA adapter",
            ModelCard,
            LoadAdapterRequest,
            errors=_TAKEN,
            outlives_client=True,
        ),
        Operation(
            "POST",
            "/v1/unload_lora_adapter",
            adapters.unload,
            "Unload a LoRA adapter",
            UnloadedAdapter,
            UnloadAdapterRequest,
            errors=_TAKEN,
            outlives_client=True,
        ),
    ]


def _openai(replica: ServerState) -> list[Operation]:
    """The APIs of OpenAI that generate."""
    chat, completions, responses = ChatRoutes(replica), CompletionRoutes(replica), ResponsesRoutes(replica)
    return [
        Operation(
            "POST",
            "/v1/chat/completions",
            chat.create,
            "Answer a conversation",
            ChatCompletion,
            ChatRequest,
            ChatChunk,
            _WORK,
        ),
        Operation(
            "POST",
            "/v1/completions",
            completions.create,
            "Continue texts",
            Completion,
            CompletionRequest,
            Completion,
            _WORK,
        ),
        Operation(
            "POST",
            "/v1/responses",
            responses.create,
            "Answer an input (OpenAI's Responses)",
            ResponseObject,
            ResponsesRequest,
            ResponseEvent,
            _WORK,
        ),
        Operation(
            "POST",
            "/v1/responses/input_tokens",
            responses.count,
            "Count the tokens of an input",
            InputTokenCount,
            ResponsesRequest,
            None,
            _TAKEN,
        ),
    ]


def _anthropic(replica: ServerState) -> list[Operation]:
    """Anthropic's API."""
    messages = MessagesRoutes(replica)
    return [
        Operation(
            "POST",
            "/v1/messages",
            messages.create,
            "Answer a conversation (Anthropic's Messages)",
            MessageObject,
            MessagesRequest,
            MessageEvent,
            _WORK,
            AnthropicErrorBody,
        ),
        Operation(
            "POST",
            "/v1/messages/count_tokens",
            messages.count,
            "Count the tokens of a conversation",
            InputTokens,
            CountTokensRequest,
            None,
            _TAKEN,
            AnthropicErrorBody,
        ),
    ]


_ELSEWHERE = dict.fromkeys(
    (
        *("/admin/keys", "/admin/usage", "/admin/audit", "/admin/routes", "/admin/records", "/admin/feedback"),
        *("/admin/content", "/v1/feedback", "/metrics/targets", "/metrics/replicas"),
    ),
    "This is a replica. Keys, limits, usage and routes are managed at a gateway (powerband gateway).",
)


def _pooling(replica: ServerState) -> list[Operation]:
    embeddings, scores = EmbeddingRoutes(replica), ScoreRoutes(replica)
    return [
        Operation(
            "POST", "/v1/embeddings", embeddings.create, "Embed texts", EmbeddingList, EmbeddingRequest, None, _WORK
        ),
        *(
            Operation("POST", path, scores.score, "Score pairs of texts", ScoreList, ScoreRequest, None, _WORK)
            for path in ("/v1/score", "/score")
        ),
        *(
            Operation("POST", path, scores.rerank, "Rank documents by a query", Ranking, RerankRequest, None, _WORK)
            for path in ("/v1/rerank", "/v2/rerank", "/rerank")
        ),
    ]


def _handler(operation: Operation) -> Callable[[Request], Awaitable[Response]]:
    """The handler, which ends when its client leaves: prompts that wait to be encoded take memory and time."""

    async def handle(request: Request) -> Response:
        with while_connected(request.scope):
            return await operation.handler(request)

    ends = operation.body is not None and not operation.outlives_client
    return handle if ends else operation.handler


def make_app(replica: ServerState) -> ASGIApp:
    """The whole application. Raises UsageError when it would be open to the network unasked."""
    key = server_key(replica.settings)
    table = operations(replica)
    description = describe(table, needs_key=key is not None)

    async def openapi(_request: Request) -> Response:
        return json_response(description)

    routes = [Route(operation.path, _handler(operation), methods=[operation.method]) for operation in table]
    routes.append(Route("/openapi.json", openapi, methods=["GET"]))
    router = Router(routes, redirect_slashes=False)
    settings = replica.settings
    origins = parse_origins(settings.allowed_origins)
    closed = BearerTokenMiddleware(router, key, settings.host, any_host=settings.insecure, origins=origins)
    known = KnownPathsMiddleware(closed, routes, "/openapi.json", _ELSEWHERE)
    return allow_pages(AnthropicErrorsMiddleware(RequestIdMiddleware(known)), origins)
