"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from powerband.openai.events import DONE, event
from powerband.output_parsers.message import ParsedMessage
from powerband.server.generation.chat_messages import delta_of, reply_of
from powerband.server.generation.chats import chat_generation
from powerband.server.generation.engine_requests import ChoiceState, Generation, OutputPiece
from powerband.server.generation.logprobs import LogprobWriter
from powerband.server.generation.respond import respond
from powerband.server.protocol import ChatRequest
from powerband.server.replica import ServerState
from powerband.server.replies import (
    FINGERPRINT,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
    PromptLogprobs,
    Usage,
)


class ChatRoutes:
    def __init__(self, replica: ServerState) -> None:
        self._replica = replica

    async def create(self, request: Request) -> Response:
        """Answer a conversation, whole or as a stream of chunks."""
        replica = self._replica
        with replica.counting_refusals():
            body = await replica.read(request, ChatRequest)
            arrival_s = time.monotonic()
            replica.check_name(body.model)
            model = replica.accept()
            generation = await chat_generation(replica, model, body, arrival_s)
            answer = _ChatResponse(generation, body, body.model or replica.name)
            return await respond(request, generation, answer, stream=bool(body.stream))


class _ChatResponse:
    """Turns the pieces of one generation into OpenAI's objects."""

    def __init__(self, generation: Generation, body: ChatRequest, model_name: str) -> None:
        self._generation = generation
        self._body = body
        self._model_name = model_name
        self._id = f"chatcmpl-{generation.id}"
        self._writer = LogprobWriter(generation.tokenizer)

    async def whole(self) -> ChatCompletion:
        generation = self._generation
        messages = [ParsedMessage() for _ in generation.choices]
        token_ids: list[list[int]] = [[] for _ in generation.choices]
        logprobs = [ChatLogprobs([]) for _ in generation.choices]
        prompt_logprobs: PromptLogprobs = [None]
        while pieces := await generation.pieces():
            for piece in pieces:
                index = piece.choice.index
                messages[index].add(piece.events)
                token_ids[index] += piece.token_ids
                logprobs[index].content += self._writer.chat(piece.logprobs).content
                if index == 0:
                    prompt_logprobs += self._writer.prompt(piece.prompt_logprobs)
        asked_ids = bool(self._body.return_token_ids)
        first = generation.choices[0]
        return ChatCompletion(
            id=self._id,
            created=generation.created_s,
            model=self._model_name,
            choices=[
                ChatChoice(
                    index=choice.index,
                    message=reply_of(messages[choice.index]),
                    logprobs=logprobs[choice.index] if self._body.logprobs else None,
                    finish_reason=choice.reason,
                    stop_reason=choice.stop_reason,
                    token_ids=token_ids[choice.index] if asked_ids else UNSET,
                )
                for choice in generation.choices
            ],
            usage=generation.usage(),
            system_fingerprint=FINGERPRINT,
            prompt_logprobs=UNSET if self._body.prompt_logprobs is None else prompt_logprobs,
            prompt_token_ids=first.prompt.token_ids if asked_ids else UNSET,
        )

    async def chunks(self) -> AsyncIterator[bytes]:
        """The role of every choice first, then what each of them gains; its finish_reason once; usage if asked for."""
        generation = self._generation
        if not self._body.resume_token_ids:  # else the client has it
            yield b"".join(self._opening(choice) for choice in generation.choices)
        while pieces := await generation.pieces():
            if data := b"".join(self._gain(piece) for piece in pieces):
                yield data
        options = self._body.stream_options
        yield (self._chunk([], generation.usage()) if options and options.include_usage else b"") + DONE

    def _opening(self, choice: ChoiceState) -> bytes:
        chunk = ChatChunkChoice(index=choice.index, delta=Delta(role="assistant", content=""))
        return self._chunk([chunk], prompt_ids=choice.prompt.token_ids if self._body.return_token_ids else UNSET)

    def _gain(self, piece: OutputPiece) -> bytes:
        data = b""
        delta = delta_of(piece.events)
        if delta != Delta() or (piece.token_ids and (self._body.logprobs or self._body.return_token_ids)):
            gain = ChatChunkChoice(
                index=piece.choice.index,
                delta=Delta(content="") if delta == Delta() else delta,
                logprobs=self._writer.chat(piece.logprobs) if self._body.logprobs else None,
                token_ids=piece.token_ids if self._body.return_token_ids else UNSET,
            )
            data = self._chunk([gain])
        if piece.finish_reason is not None:
            choice = piece.choice
            end = ChatChunkChoice(
                index=choice.index, delta=Delta(), finish_reason=choice.reason, stop_reason=choice.stop_reason
            )
            data += self._chunk([end])
        return data

    def _chunk(
        self,
        choices: list[ChatChunkChoice],
        usage: Usage | None = None,
        prompt_ids: list[int] | msgspec.UnsetType = UNSET,
    ) -> bytes:
        options = self._body.stream_options
        if options is not None and options.continuous_usage_stats:
            usage = self._generation.usage()
        return event(
            msgspec.json.encode(
                ChatChunk(
                    id=self._id,
                    created=self._generation.created_s,
                    model=self._model_name,
                    choices=choices,
                    system_fingerprint=FINGERPRINT,
                    usage=usage if options and (options.include_usage or usage) else UNSET,
                    prompt_token_ids=prompt_ids,
                )
            )
        )
