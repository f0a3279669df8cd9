"""The outermost middleware: gives every request an id, and every error OpenAI's format."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from powerband.errors import PowerbandError
from powerband.web.client_connection import ClientDisconnected
from powerband.web.errors import HttpError, error_response

logger = logging.getLogger(__name__)
_LABEL_CHARS = 128
_MORE_HEADERS = "more_headers"
_IGNORED_STATE = "ignored_fields"
_IGNORED_HEADER = b"x-ignored-fields"
_MAX_IGNORED_CHARS = 1000  # of the header


def add_headers(scope: Scope, headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Send these headers with the response, whichever it will be."""
    scope["state"].setdefault(_MORE_HEADERS, []).extend(headers)


def note_ignored_fields(scope: Scope, names: Iterable[str]) -> None:
    """Name these fields of the request in the response's `X-Ignored-Fields`."""
    # Names come from clients: quoted, so that none can be more than a name in a list.
    value = ", ".join(quote(name[:_LABEL_CHARS], safe="$[]") for name in names)
    scope["state"][_IGNORED_STATE] = value[:_MAX_IGNORED_CHARS].encode("ascii")


def pass_on_ignored_fields(scope: Scope, headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Send the `X-Ignored-Fields` of another server's response (names in lower case) with the response to `scope`."""
    for name, value in headers:
        if name == _IGNORED_HEADER:
            scope["state"][_IGNORED_STATE] = value[:_MAX_IGNORED_CHARS]


class RequestIdMiddleware:
    """Sets the response's `X-Request-Id` and `scope["state"]["request_id"]` to a new id.

    An id that the client sends is only logged as a label; it identifies nothing.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        start_s = time.monotonic()
        request_id = f"req_{uuid.uuid4().hex}"
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = scope["state"].get(_MORE_HEADERS, ())
                headers = [*message.get("headers", ()), *more, (b"x-request-id", request_id.encode())]
                if ignored := scope["state"].get(_IGNORED_STATE):
                    headers.append((_IGNORED_HEADER, ignored))
                message["headers"] = headers
            await send(message)

        scope.setdefault("state", {})["request_id"] = request_id
        scope["app"] = self  # makes Starlette's router raise, not answer, for unknown paths and methods
        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnected:
            status = 499
        except Exception as error:
            if status:  # the response has begun: the server closes the connection
                raise
            await error_response(self._as_powerband_error(error, request_id), scope)(scope, receive, send_with_id)
        if logger.isEnabledFor(logging.DEBUG):
            label = dict(scope["headers"]).get(b"x-request-id", b"").decode("ascii", "replace")[:_LABEL_CHARS]
            logger.debug(
                "%s %r %d in %.3f s",
                scope["method"],
                scope["path"][:_LABEL_CHARS],
                status,
                time.monotonic() - start_s,
                extra={"request_id": request_id, "client_label": label},
            )

    def _as_powerband_error(self, error: Exception, request_id: str) -> PowerbandError:
        if isinstance(error, PowerbandError):
            return error
        if isinstance(error, HTTPException):
            if error.status_code == 404:
                return HttpError(404, "not_found", "There is no such path.")
            if error.status_code == 405:
                allowed = (error.headers or {}).get("Allow", "")
                return HttpError(405, "method_not_allowed", f"This path takes {allowed}.", allow=allowed)
            return HttpError(error.status_code, "http_error", error.detail)
        logger.error("Request %s failed with an unexpected error.", request_id, exc_info=error)
        return PowerbandError(
            "The server failed with an unexpected error.", hint=f"Its log has the details, under {request_id}."
        )
