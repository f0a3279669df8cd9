"""What a replica says against a request, in whichever form its server writes errors, and what the client is to hear.

OpenAI, vLLM, llama.cpp    {"error": {"message", "type", "param", "code"}}; code: a string, or the HTTP status
older vLLM, TensorRT-LLM   {"object": "error", "message", "type", "param", "code"}
FastAPI                    {"detail": "..." or [{"loc", "msg", ...}]}
Ollama, TGI                {"error": "..."}
proxies in between         a page of HTML, or any text
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

import msgspec

from powerband.errors import PowerbandError
from powerband.gateway.proxy.events import NO_JSON

MAX_BYTES = 64 << 10
MAX_MESSAGE = 500  # characters
MAX_RETRY_AFTER_S = 30 * 86400.0
_MAX_CODE = 80
_REQUEST_STATUSES = (400, 413, 422)


@dataclass(frozen=True, slots=True)
class UpstreamError:
    """'' for what it does not say."""

    message: str = ""
    code: str = ""
    type: str = ""
    param: str | None = None
    status: int = 0  # that an error in the middle of a stream names

    @property
    def is_about_request(self) -> bool:
        """Whether another replica would say the same."""
        return self.status in _REQUEST_STATUSES or self.type.lower().startswith(("invalid_request", "badrequest"))


class InvalidUpstreamRequest(PowerbandError):
    """A replica says that the request is wrong: another would say the same."""

    http_status = 400
    default_code = "invalid_request"

    def __init__(self, complaint: UpstreamError, status: int = 400) -> None:
        super().__init__(
            complaint.message or f"The replica refuses the request: {phrase(status)}.",
            code=complaint.code,
            param=complaint.param,
        )
        self.http_status = status


def read_upstream_error(body: bytes) -> UpstreamError:
    """From the body of an error. Empty when it is in none of the forms."""
    if len(body) > MAX_BYTES:
        return UpstreamError()
    try:
        return upstream_error_from(msgspec.json.decode(body))
    except NO_JSON:
        return UpstreamError()


def upstream_error_from(value: Any) -> UpstreamError:
    """From a decoded body, or the 'error' of an event."""
    if isinstance(value, dict) and value.get("error"):
        value = value["error"]
    if isinstance(value, str):
        return UpstreamError(value[:MAX_MESSAGE])
    if not isinstance(value, dict):
        return UpstreamError()
    message, code, param = value.get("message"), value.get("code"), value.get("param")
    if not isinstance(message, str):
        detail = value.get("detail")
        message = detail if isinstance(detail, str) else msgspec.json.encode(detail).decode() if detail else ""
    return UpstreamError(
        message=message[:MAX_MESSAGE],
        code=code[:_MAX_CODE] if isinstance(code, str) else "",
        type=str(value.get("type") or ""),
        param=param[:_MAX_CODE] if isinstance(param, str) else None,
        status=code if isinstance(code, int) else 0,
    )


def with_served_name(complaint: UpstreamError, model: str, served: str) -> UpstreamError:
    """What the model is called behind the gateway concerns no client."""
    if model == served or not model:
        return complaint
    return replace(complaint, message=complaint.message.replace(model, served))


def phrase(status: int) -> str:
    """'413 Request Entity Too Large'."""
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def retry_after_s(headers: Iterable[tuple[bytes, bytes]]) -> float | None:
    """The Retry-After header (RFC 9110, section 10.2.3) in seconds from now, 0 to MAX_RETRY_AFTER_S; None: missing, or
    invalid.
    """
    value = next((value for name, value in headers if name == b"retry-after"), b"").decode("latin-1").strip()
    if value.replace(".", "", 1).isdecimal() and value.isascii():  # some servers say fractions
        seconds = float(value)
    else:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)
