"""Server-sent events, and detection of client disconnects even while nothing is sent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from powerband.core.loop import error_info
from powerband.core.step import ErrorInfo
from powerband.errors import PowerbandError
from powerband.openai.events import event
from powerband.web.errors import error_body

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


class EventStream(Response):
    """Sends `events` as they come, and calls `finish` at the end, even after an error.

    `send` waits while the client reads slowly, so only the small write buffer fills up.
    """

    def __init__(self, events: AsyncIterator[bytes], finish: Callable[[], None]) -> None:
        self._events = events
        self._finish = finish
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 (ASGI's signature)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": list(STREAM_HEADERS)})
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._finish()


def error_event(error: ErrorInfo) -> bytes:
    """The last event of a stream that failed, in place of [DONE]."""
    return event(msgspec.json.encode(error_body(error)))


async def with_errors(
    events: AsyncIterator[bytes], last: Callable[[ErrorInfo], bytes] = error_event
) -> AsyncIterator[bytes]:
    """The same events; an error becomes the last event, as `last` writes it."""
    try:
        async for data in events:
            yield data
    except PowerbandError as error:
        yield last(error_info(error))


class DisconnectWatcher:
    """Watches for the client's disconnect. `then` is called once when it happens; `left` stays true."""

    def __init__(self, receive: Receive) -> None:
        self.left = False
        self._then: Callable[[], None] | None = None
        self._task = asyncio.create_task(self._watch(receive))

    def then(self, call: Callable[[], None]) -> None:
        self._then = call
        if self.left:
            call()

    def close(self) -> None:
        self._task.cancel()

    async def _watch(self, receive: Receive) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while (await receive())["type"] != "http.disconnect":
                pass
            self.left = True
            if self._then is not None:
                self._then()
