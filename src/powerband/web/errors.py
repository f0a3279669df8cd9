"""HTTP error responses, in the format of OpenAI's API unless `set_error_format` sets another for the request."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Scope

from powerband.core.loop import error_info
from powerband.core.step import ErrorInfo
from powerband.errors import PowerbandError
from powerband.openai.errors import ErrorBody, ErrorObject

_FORMAT = "error_format"
_TYPES = {429: "rate_limit_error", 503: "service_unavailable_error"}


class HttpError(PowerbandError):
    """An error that only exists in HTTP: no such route, no key, a body too large."""

    exit_code = 2

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, hint: str = "", allow: str = ""
    ) -> None:
        super().__init__(message, code=code, param=param, hint=hint)
        self.http_status = status
        self.allow = allow  # methods, for 405


def error_body(error: ErrorInfo) -> ErrorBody:
    default = "invalid_request_error" if error.http_status < 500 else "server_error"
    return ErrorBody(
        ErrorObject(
            message=f"{error.message} {error.hint}".rstrip(),
            type=_TYPES.get(error.http_status, default),
            param=error.param,
            code=error.code,
        )
    )


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


def set_error_format(scope: Scope, encode: Callable[[ErrorInfo], bytes]) -> None:
    """Send errors of this request as `encode` writes them."""
    scope.setdefault("state", {})[_FORMAT] = encode


def error_response(error: ErrorInfo | PowerbandError, scope: Scope | None = None) -> Response:
    """scope: of the request; None: it could not be read."""
    info = error_info(error) if isinstance(error, PowerbandError) else error
    encode: Callable[[ErrorInfo], bytes] | None = (scope or {}).get("state", {}).get(_FORMAT)
    headers = {}
    if isinstance(error, HttpError) and error.allow:
        headers["Allow"] = error.allow
    if info.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if info.http_status in (429, 503) and info.retry_after_s != math.inf:  # inf: a retry does not help
        headers["Retry-After"] = str(max(1, math.ceil(info.retry_after_s or 1.0)))
    data = msgspec.json.encode(error_body(info)) if encode is None else encode(info)
    return Response(data, info.http_status, headers, media_type="application/json")
