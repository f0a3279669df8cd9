"""/v1/responses and /v1/responses/input_tokens."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from powerband.core.step import ErrorInfo
from powerband.output_parsers.events import CallArguments, CallStart, Content, Reasoning
from powerband.server.generation.chats import chat_generation, count_tokens
from powerband.server.generation.engine_requests import Generation, OutputPiece
from powerband.server.generation.logprobs import LogprobWriter
from powerband.server.generation.respond import respond
from powerband.server.protocol import ChatRequest
from powerband.server.replica import ServerState
from powerband.server.replies import TokenLogprob
from powerband.server.responses.amendment import ResponsesAmendment
from powerband.server.responses.objects import (
    InputTokenCount,
    InputTokensDetails,
    OutputTokensDetails,
    ReasoningConfig,
    ResponseError,
    ResponseObject,
    ResponseUsage,
)
from powerband.server.responses.requests import ReasoningOptions, ResponsesRequest
from powerband.server.responses.translation import to_chat
from powerband.server.responses.truncation import leave_out_oldest
from powerband.server.responses.writer import ResponseWriter
from powerband.web.errors import json_response


class ResponsesRoutes:
    def __init__(self, replica: ServerState) -> None:
        self._replica = replica

    async def create(self, request: Request) -> Response:
        """Answer an input, whole or as a stream of events."""
        replica = self._replica
        with replica.counting_refusals():
            body = await replica.read(request, ResponsesRequest, ResponsesAmendment)
            arrival_s = time.monotonic()
            replica.check_name(body.model)
            model = replica.accept()
            chat, places = to_chat(body)
            with places.translating():
                if body.truncation == "auto":
                    await leave_out_oldest(replica, model, chat)
                generation = await chat_generation(replica, model, chat, arrival_s)
                answer = _ResponseBuilder(generation, body, chat, body.model or replica.name)
                stream = bool(body.stream)
                return await respond(request, generation, answer, stream=stream, last_event=answer.failed)

    async def count(self, request: Request) -> Response:
        """The number of tokens of an input, without an answer."""
        replica = self._replica
        body = await replica.read(request, ResponsesRequest, ResponsesAmendment)
        replica.check_name(body.model)
        chat, places = to_chat(body)
        with places.translating():
            if body.truncation == "auto":
                await leave_out_oldest(replica, replica.model, chat)
            count = await count_tokens(replica, replica.model, chat)
        return json_response(InputTokenCount(count))


class _ResponseBuilder:
    """Turns the pieces of one generation into OpenAI's response or its events."""

    def __init__(self, generation: Generation, body: ResponsesRequest, chat: ChatRequest, model_name: str) -> None:
        self._generation = generation
        self._gives_logprobs = bool(chat.logprobs)
        self._logprobs = LogprobWriter(generation.tokenizer)
        self._pending: list[TokenLogprob] = []  # of tokens whose text is to come
        response = _response(body, generation, model_name)
        self._writer = ResponseWriter(response, writes_events=bool(body.stream))

    async def whole(self) -> ResponseObject:
        while await self._advance():
            pass
        return self._writer.response

    async def chunks(self) -> AsyncIterator[bytes]:
        """See ResponseWriter."""
        self._writer.begin()
        yield self._writer.take()
        while await self._advance():
            if data := self._writer.take():
                yield data
        yield self._writer.take()

    def failed(self, error: ErrorInfo) -> bytes:
        """The last event of a stream that failed."""
        code = "server_error" if error.http_status >= 500 else "rate_limit_exceeded"
        self._writer.fail(ResponseError(code, f"{error.message} {error.hint}".rstrip()))
        return self._writer.take()

    async def _advance(self) -> bool:
        """Write the next pieces. False: that was the end."""
        pieces = await self._generation.pieces()
        for piece in pieces:
            self._write(piece)
        if not pieces:
            if self._pending and self._writer.writes_text:
                self._writer.add_text("", self._pending)
            [choice] = self._generation.choices
            self._writer.end(self._usage(), is_complete=choice.reason != "length")
        return bool(pieces)

    def _write(self, piece: OutputPiece) -> None:
        if self._gives_logprobs:
            self._pending += self._logprobs.chat(piece.logprobs).content
        for event in piece.events:
            match event:
                case Content(text):
                    self._writer.add_text(text, self._pending)
                    self._pending = []
                case Reasoning(text):
                    self._writer.add_reasoning(text)
                    self._pending = []
                case CallStart():
                    self._writer.begin_call(event.id, event.name)
                    self._pending = []
                case CallArguments():
                    self._writer.add_arguments(event.text)

    def _usage(self) -> ResponseUsage:
        usage = self._generation.usage()
        details = usage.completion_tokens_details
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(0 if details is msgspec.UNSET else details.reasoning_tokens),
            total_tokens=usage.total_tokens,
        )


def _response(body: ResponsesRequest, generation: Generation, model_name: str) -> ResponseObject:
    """A response that has just begun."""
    reasoning, text = body.reasoning or ReasoningOptions(), body.text
    return ResponseObject(
        id=f"resp_{generation.id}",
        created_at=generation.created_s,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        metadata=body.metadata or {},
        model=model_name,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        prompt_cache_key=body.prompt_cache_key,
        reasoning=ReasoningConfig(effort=reasoning.effort, summary=reasoning.summary or reasoning.generate_summary),
        safety_identifier=body.safety_identifier,
        temperature=generation.params.temperature,
        text={"format": _sent(text.format) if text and text.format else {"type": "text"}, "verbosity": "medium"},
        tool_choice=_sent(body.tool_choice) or "auto",
        tools=[_sent(tool) for tool in body.tools or ()],
        top_logprobs=body.top_logprobs or 0,
        top_p=generation.params.top_p,
        truncation=body.truncation or "disabled",
        user=body.user,
    )


def _sent(value: Any) -> Any:
    """A part of the request, to be repeated in the response."""
    return msgspec.to_builtins(value)
