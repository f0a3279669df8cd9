"""Errors as an OpenAI-compatible API sends them, and as other servers do:

OpenAI, vLLM, llama.cpp    {"error": {"message", "type", "param", "code"}}; code: a string, or the HTTP status
older vLLM, TensorRT-LLM   {"object": "error", "message", "type", "param", "code"}
FastAPI                    {"detail": "..." or [{"loc", "msg", ...}]}
Ollama, TGI                {"error": "..."}
proxies in between         a page of HTML, or any text
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from powerband.openai.chunks import INVALID_JSON

MAX_ERROR_BYTES = 64 << 10
MAX_MESSAGE_CHARS = 500
_MAX_CODE_CHARS = 80
_REQUEST_STATUSES = (400, 413, 422)


class ErrorObject(msgspec.Struct, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """The body of every response with a status of 400 and above."""

    error: ErrorObject


@dataclass(frozen=True, slots=True)
class ReportedError:
    """An error that a server reported. Missing fields are ''."""

    message: str = ""
    code: str = ""
    type: str = ""
    param: str | None = None
    status: int = 0  # HTTP status named by an error in the middle of a stream

    @property
    def is_about_request(self) -> bool:
        """Whether the request is at fault, so that another replica would reject it, too."""
        return self.status in _REQUEST_STATUSES or self.type.lower().startswith(("invalid_request", "badrequest"))


def read_error(body: bytes) -> ReportedError:
    """Parse the body of an error response. Empty if it has none of the formats above."""
    if len(body) > MAX_ERROR_BYTES:
        return ReportedError()
    try:
        return error_from(msgspec.json.decode(body))
    except INVALID_JSON:
        return ReportedError()


def error_from(value: Any) -> ReportedError:
    """Parse a decoded body, or the 'error' of an event."""
    if isinstance(value, dict) and value.get("error"):
        value = value["error"]
    if isinstance(value, str):
        return ReportedError(value[:MAX_MESSAGE_CHARS])
    if not isinstance(value, dict):
        return ReportedError()
    message, code, param = value.get("message"), value.get("code"), value.get("param")
    if not isinstance(message, str):
        detail = value.get("detail")
        message = detail if isinstance(detail, str) else msgspec.json.encode(detail).decode() if detail else ""
    return ReportedError(
        message=message[:MAX_MESSAGE_CHARS],
        code=code[:_MAX_CODE_CHARS] if isinstance(code, str) else "",
        type=str(value.get("type") or ""),
        param=param[:_MAX_CODE_CHARS] if isinstance(param, str) else None,
        status=code if isinstance(code, int) else 0,
    )
