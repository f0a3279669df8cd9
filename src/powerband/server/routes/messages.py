"""/v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from powerband.core.step import ErrorInfo
from powerband.openai.events import named_event
from powerband.output_parsers.events import CallArguments, CallStart, Content, Reasoning
from powerband.server.generation.chats import chat_generation, count_tokens
from powerband.server.generation.engine_requests import Generation, OutputPiece
from powerband.server.generation.respond import respond
from powerband.server.messages.amendment import MessagesAmendment
from powerband.server.messages.objects import InputTokens, MessageObject, MessageUsage, Stop, ThinkingTokens
from powerband.server.messages.requests import CountTokensRequest, MessagesRequest
from powerband.server.messages.translation import to_chat
from powerband.server.messages.writer import BlockWriter
from powerband.server.replica import ServerState
from powerband.web.anthropic import anthropic_error
from powerband.web.errors import json_response

_STOPS: dict[str, Stop] = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}


class MessagesRoutes:
    def __init__(self, replica: ServerState) -> None:
        self._replica = replica

    async def create(self, request: Request) -> Response:
        """Answer a conversation, whole or as a stream of events."""
        replica = self._replica
        with replica.counting_refusals():
            body = await replica.read(request, MessagesRequest, MessagesAmendment)
            arrival_s = time.monotonic()
            replica.check_name(body.model)
            model = replica.accept()
            chat, places = to_chat(body, model)
            with places.translating():
                # Every request has to have a limit, so clients send one that fits no particular model.
                generation = await chat_generation(replica, model, chat, arrival_s, caps_max_tokens=True)
                answer = _MessageBuilder(generation, body, body.model or replica.name)
                stream = bool(body.stream)
                return await respond(request, generation, answer, stream=stream, last_event=_failed)

    async def count(self, request: Request) -> Response:
        """The number of tokens of a conversation, without an answer."""
        replica = self._replica
        body = await replica.read(request, CountTokensRequest, MessagesAmendment)
        replica.check_name(body.model)
        model = replica.model
        chat, places = to_chat(body, model)
        with places.translating():
            count = await count_tokens(replica, model, chat)
        return json_response(InputTokens(count))


class _MessageBuilder:
    """Turns the pieces of one generation into Anthropic's message or its events."""

    def __init__(self, generation: Generation, body: MessagesRequest, model_name: str) -> None:
        self._generation = generation
        self._max_tokens = body.max_tokens
        message = MessageObject(id=f"msg_{generation.id}", model=model_name, usage=self._usage())
        self._writer = BlockWriter(message, writes_events=bool(body.stream))

    async def whole(self) -> MessageObject:
        while pieces := await self._generation.pieces():
            self._write(pieces)
        self._end()
        return self._writer.message

    async def chunks(self) -> AsyncIterator[bytes]:
        """See BlockWriter."""
        pieces = await self._generation.pieces()  # with them comes how much of the prompt was in the cache
        self._writer.begin(self._usage())
        while pieces:
            self._write(pieces)
            if data := self._writer.take():
                yield data
            pieces = await self._generation.pieces()
        self._end()
        yield self._writer.take()

    def _write(self, pieces: list[OutputPiece]) -> None:
        for piece in pieces:
            for event in piece.events:
                match event:
                    case Content(text):
                        self._writer.add_text(text)
                    case Reasoning(text):
                        self._writer.add_reasoning(text)
                    case CallStart():
                        self._writer.begin_call(event.id, event.name)
                    case CallArguments():
                        self._writer.add_arguments(event.text)

    def _end(self) -> None:
        [choice] = self._generation.choices
        reason = _STOPS[choice.reason]
        stop_sequence = None
        if reason == "end_turn" and isinstance(choice.stop_reason, str):
            reason, stop_sequence = "stop_sequence", choice.stop_reason
        elif reason == "max_tokens" and choice.num_tokens < self._max_tokens:
            reason = "model_context_window_exceeded"
        self._writer.end(reason, stop_sequence, self._usage())

    def _usage(self) -> MessageUsage:
        usage = self._generation.usage()
        cached = usage.prompt_tokens_details.cached_tokens
        details = usage.completion_tokens_details
        return MessageUsage(
            input_tokens=usage.prompt_tokens - cached,
            cache_read_input_tokens=cached,
            output_tokens=usage.completion_tokens,
            output_tokens_details=UNSET if details is UNSET else ThinkingTokens(details.reasoning_tokens),
        )


def _failed(error: ErrorInfo) -> bytes:
    """The last event of a stream that failed."""
    return named_event("error", anthropic_error(error))
