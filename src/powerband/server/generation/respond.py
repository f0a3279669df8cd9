"""Sends the response of a request that generates, whole or as a stream, and always closes the generation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from powerband.core.step import ErrorInfo
from powerband.server.generation.engine_requests import Generation
from powerband.web.errors import json_response
from powerband.web.streaming import EventStream, error_event, with_errors


class ResponseBuilder(Protocol):
    """Turns the pieces of a generation into the objects of an API."""

    async def whole(self) -> Any: ...

    def chunks(self) -> AsyncIterator[bytes]: ...


async def respond(
    request: Request,
    generation: Generation,
    answer: ResponseBuilder,
    *,
    stream: bool,
    last_event: Callable[[ErrorInfo], bytes] = error_event,
) -> Response:
    """Raises the engine's refusal before the first byte of a stream. last_event: of a stream that fails after it."""
    try:
        await generation.start(request.receive)
        if stream:
            return EventStream(with_errors(answer.chunks(), last_event), generation.close)
        completion = await answer.whole()
    except BaseException:
        generation.close()
        raise
    generation.close()
    return json_response(completion)
