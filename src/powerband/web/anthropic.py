"""What a server of Anthropic's API has of its own, at the paths below /v1/messages: where keys are, and errors' format.

{"type": "error", "error": {"type": "not_found_error", "message": "…"}}    https://docs.anthropic.com/en/api/errors
"""

from __future__ import annotations

from typing import Literal

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from powerband.core.step import ErrorInfo
from powerband.web.errors import error_body, set_error_format

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_PATH = "/v1/messages"


class AnthropicError(msgspec.Struct, kw_only=True):
    """`code` is Powerband's, because errors of one type have several causes."""

    type: str
    message: str
    code: str | None


class AnthropicErrorBody(msgspec.Struct):
    error: AnthropicError
    type: Literal["error"] = "error"


def is_anthropic(path: str) -> bool:
    """Whether a path belongs to Anthropic's API."""
    return path == _PATH or path.startswith(f"{_PATH}/")


def sent_keys(scope: Scope) -> list[bytes]:
    """The values of the request's Authorization headers. Anthropic's clients send `x-api-key` instead."""
    headers = scope["headers"]
    sent = [value for name, value in headers if name == b"authorization"]
    if not sent and is_anthropic(scope["path"]):
        sent = [b"Bearer " + value for name, value in headers if name == b"x-api-key"]
    return sent


def anthropic_error(error: ErrorInfo) -> bytes:
    kind = _TYPES.get(error.http_status, "invalid_request_error" if error.http_status < 500 else "api_error")
    found = error_body(error).error
    return msgspec.json.encode(AnthropicErrorBody(AnthropicError(type=kind, message=found.message, code=found.code)))


class AnthropicErrorsMiddleware:
    """Outside of RequestIdMiddleware, which sends the errors."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if is_anthropic(scope.get("path", "")):
            set_error_format(scope, anthropic_error)
        await self._app(scope, receive, send)
