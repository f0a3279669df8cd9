"""Sends the response of both kinds of completion, whole or as a stream, and always closes the generation."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from powerband.server.generation.engine_requests import Generation
from powerband.web.errors import json_response
from powerband.web.streaming import EventStream, with_errors


class ResponseBuilder(Protocol):
    """Turns the pieces of a generation into OpenAI's objects."""

    async def whole(self) -> Any: ...

    def chunks(self) -> AsyncIterator[bytes]: ...


async def respond(request: Request, generation: Generation, answer: ResponseBuilder, *, stream: bool) -> Response:
    """Raises the engine's refusal before the first byte of a stream."""
    try:
        await generation.start(request.receive)
        if stream:
            return EventStream(with_errors(answer.chunks()), generation.close)
        completion = await answer.whole()
    except BaseException:
        generation.close()
        raise
    generation.close()
    return json_response(completion)
