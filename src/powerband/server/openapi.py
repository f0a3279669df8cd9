"""The OpenAPI description, made from the types that requests are validated with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from powerband.openai.errors import ErrorBody
from powerband.server.auth import OPEN_PATHS
from powerband.server.pooling.protocol import INPUT_SCHEMA, EmbeddingRequest
from powerband.server.protocol import PROMPT_SCHEMA, CompletionRequest


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path. `reply` None: plain text. `errors`: statuses in addition to those of every route.

    `outlives_client`: it goes on when its client leaves.
    """

    method: str
    path: str
    handler: Callable[[Request], Awaitable[Response]]
    summary: str
    reply: Any = None
    body: Any = None
    chunk: Any = None
    errors: tuple[int, ...] = ()
    error: Any = ErrorBody
    outlives_client: bool = False


def describe(operations: Sequence[Operation], *, needs_key: bool) -> dict[str, Any]:
    """An OpenAPI 3.2 document. Every error status that a route may answer is declared, and so are streams."""
    types = [t for o in operations for t in (o.body, o.reply, o.chunk, o.error) if t is not None]
    unique = list(dict.fromkeys([*types, ErrorBody]))
    schemas, components = msgspec.json.schema_components(unique, ref_template="#/components/schemas/{name}")
    components[CompletionRequest.__name__]["properties"]["prompt"] = PROMPT_SCHEMA
    components[EmbeddingRequest.__name__]["properties"]["input"] = INPUT_SCHEMA
    schema_of = dict(zip(unique, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        path = operation.path.replace(":path", "")
        paths.setdefault(path, {})[operation.method.lower()] = _operation(operation, path, schema_of, needs_key)
    document: dict[str, Any] = {
        "openapi": "3.2.0",
        "info": {"title": "Powerband", "version": version("powerband"), "description": "One replica's API."},
        "paths": paths,
        "components": {"schemas": components},
    }
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _operation(operation: Operation, path: str, schema_of: dict[Any, Any], needs_key: bool) -> dict[str, Any]:
    content: dict[str, Any]
    if operation.reply is None:
        content = {"text/plain": {"schema": {"type": "string"}}}
    else:
        content = {"application/json": {"schema": schema_of[operation.reply]}}
    if operation.chunk is not None:
        content["text/event-stream"] = {
            "itemSchema": _event({"anyOf": [schema_of[operation.chunk], schema_of[operation.error]]})
        }
    closed = path not in OPEN_PATHS
    statuses = [*operation.errors, *([401 if needs_key else 403] if closed else [])]
    error = {"application/json": {"schema": schema_of[operation.error]}}
    responses = {"200": {"description": "OK", "content": content}}
    responses |= {str(s): {"description": HTTPStatus(s).phrase, "content": error} for s in sorted(statuses)}
    described: dict[str, Any] = {"summary": operation.summary, "responses": responses}
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema_of[operation.body]}},
        }
    if "{name}" in path:
        described["parameters"] = [
            {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    if closed and needs_key:
        described["security"] = [{"key": []}]
    return described


def _event(data: dict[str, Any]) -> dict[str, Any]:
    """The schema of a server-sent event with `data` in JSON, or with the [DONE] that ends OpenAI's streams."""
    text = {"type": "string", "contentMediaType": "application/json", "contentSchema": data}
    return {
        "type": "object",
        "required": ["data"],
        "properties": {"event": {"type": "string"}, "data": {"anyOf": [{"const": "[DONE]"}, text]}},
        "additionalProperties": False,
    }
