"""/v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from powerband.errors import InvalidRequest
from powerband.openai.events import DONE, event
from powerband.server.generation.engine_requests import ChoiceState, Generation, OutputPiece
from powerband.server.generation.logprobs import LogprobWriter
from powerband.server.generation.prompts import completion_prompts
from powerband.server.generation.respond import respond
from powerband.server.generation.sampling import completion_params
from powerband.server.generation.structured import with_grammar
from powerband.server.protocol import CompletionRequest
from powerband.server.replica import ServerState
from powerband.server.replies import (
    FINGERPRINT,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    PromptLogprobs,
    Usage,
)


class CompletionRoutes:
    def __init__(self, replica: ServerState) -> None:
        self._replica = replica

    async def create(self, request: Request) -> Response:
        """Continue one or several texts, whole or as a stream of chunks."""
        replica = self._replica
        with replica.counting_refusals():
            body = await replica.read(request, CompletionRequest)
            arrival_s = time.monotonic()
            replica.check_name(body.model)
            if body.echo and body.resume_token_ids:
                raise InvalidRequest("What is resumed has been echoed already.", param="echo")
            model = replica.accept()
            prompts = await completion_prompts(replica, model, body)
            params = completion_params(body, model, max(len(prompt.token_ids) for prompt in prompts))
            params = await with_grammar(replica, model, body, params)
            generation = Generation(replica, model, body, prompts, params, arrival_s)
            answer = _CompletionResponse(generation, body, body.model or replica.name)
            return await respond(request, generation, answer, stream=bool(body.stream))


class _CompletionResponse:
    """Turns the pieces of one generation into OpenAI's objects."""

    def __init__(self, generation: Generation, body: CompletionRequest, model_name: str) -> None:
        self._generation = generation
        self._body = body
        self._model_name = model_name
        self._id = f"cmpl-{generation.id}"
        self._only_prompt = body.max_tokens == 0
        self._begun: set[int] = set()
        self._writers: dict[int, LogprobWriter] = {}
        self._echoes: dict[int, str] = {}  # by prompt, where token ids were sent

    async def whole(self) -> Completion:
        generation = self._generation
        choices = [
            CompletionChoice(index=choice.index, text="", logprobs=None, finish_reason=None)
            for choice in generation.choices
        ]
        texts: list[list[str]] = [[] for _ in choices]
        token_ids: list[list[int]] = [[] for _ in choices]
        prompts: list[PromptLogprobs] = [[None] for _ in choices]
        await self._skip_resumed()
        while pieces := await generation.pieces():
            for piece in pieces:
                if self._body.prompt_logprobs is not None:
                    prompts[piece.choice.index] += self._writer(piece.choice).prompt(piece.prompt_logprobs)
                choice, gain = choices[piece.choice.index], self._gain(piece)
                texts[choice.index].append(gain.text)
                choice.finish_reason, choice.stop_reason = gain.finish_reason, gain.stop_reason
                choice.logprobs = _joined(choice.logprobs, gain.logprobs)
                if gain.token_ids is not UNSET:
                    token_ids[choice.index] += gain.token_ids
                    choice.token_ids = token_ids[choice.index]
                if gain.prompt_token_ids is not UNSET:
                    choice.prompt_token_ids = gain.prompt_token_ids
        for choice in choices:
            choice.text = "".join(texts[choice.index])
            if self._body.prompt_logprobs is not None:
                choice.prompt_logprobs = prompts[choice.index]
        return self._completion(choices, generation.usage())

    async def chunks(self) -> AsyncIterator[bytes]:
        """What each choice gains, its finish_reason once, usage if asked for."""
        options = self._body.stream_options
        include, always = (options.include_usage, options.continuous_usage_stats) if options else (False, False)
        await self._skip_resumed()
        while pieces := await self._generation.pieces():
            data = []
            for piece in pieces:
                gain = self._gain(piece)
                if gain.text or gain.finish_reason or gain.logprobs or gain.token_ids:
                    usage = self._generation.usage() if always else None if include else UNSET
                    data.append(event(msgspec.json.encode(self._completion([gain], usage))))
            if data:
                yield b"".join(data)
        last = self._completion([], self._generation.usage())
        yield (event(msgspec.json.encode(last)) if include else b"") + DONE

    def _gain(self, piece: OutputPiece) -> CompletionChoice:
        """What a piece adds to its choice; the first also has the echo of the prompt."""
        body, index = self._body, piece.choice.index
        is_first = index not in self._begun
        self._begun.add(index)
        text = self._echoed(piece.choice) if is_first and body.echo else ""
        logprobs = None
        if body.logprobs is not None:
            logprobs, writer = CompletionLogprobs(), self._writer(piece.choice)
            if body.echo:
                if is_first:
                    logprobs = writer.first_of_prompt(piece.choice.prompt.token_ids[0])
                logprobs = writer.completion(piece.prompt_logprobs, logprobs)
            if not self._only_prompt:
                logprobs = writer.completion(piece.logprobs, logprobs)
        gain = CompletionChoice(
            index=index,
            text=text if self._only_prompt else text + piece.text,
            logprobs=logprobs,
            finish_reason=piece.choice.reason if piece.finish_reason is not None else None,
            stop_reason=piece.choice.stop_reason if piece.finish_reason is not None else UNSET,
        )
        if body.return_token_ids:
            gain.token_ids = [] if self._only_prompt else piece.token_ids
            if is_first:
                gain.prompt_token_ids = piece.choice.prompt.token_ids
        return gain

    def _echoed(self, choice: ChoiceState) -> str:
        """The prompt as it was sent; special tokens, also a BOS that the tokenizer added, as in the output."""
        prompt, tokenizer = choice.prompt, self._generation.tokenizer
        if tokenizer is None:
            return prompt.text or ""
        skips = choice.request.params.skip_special_tokens
        if id(prompt) not in self._echoes:
            text = prompt.text
            if text is None:
                text = tokenizer.decode(prompt.token_ids, skips)
            elif not skips and prompt.token_ids[0] == tokenizer.bos_token_id:
                bos = tokenizer.token(prompt.token_ids[0])
                text = text if text.startswith(bos) else bos + text
            self._echoes[id(prompt)] = text
        return self._echoes[id(prompt)]

    def _writer(self, choice: ChoiceState) -> LogprobWriter:
        writer = self._writers.get(choice.index)
        if writer is None:
            context = () if self._body.echo else choice.prompt.token_ids
            skips = choice.request.params.skip_special_tokens
            writer = self._writers[choice.index] = LogprobWriter(self._generation.tokenizer, context, skips)
        return writer

    async def _skip_resumed(self) -> None:
        """Offsets continue after the text of the resumed output."""
        generation = self._generation
        if generation.resumed and self._body.logprobs is not None:
            await generation.in_thread(self._writer(generation.choices[0]).skip, generation.resumed)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | msgspec.UnsetType | None) -> Completion:
        return Completion(
            id=self._id,
            created=self._generation.created_s,
            model=self._model_name,
            choices=choices,
            system_fingerprint=FINGERPRINT,
            usage=usage,
        )


def _joined(whole: CompletionLogprobs | None, gain: CompletionLogprobs | None) -> CompletionLogprobs | None:
    if whole is None or gain is None:
        return whole or gain
    whole.tokens += gain.tokens
    whole.token_logprobs += gain.token_logprobs
    whole.top_logprobs += gain.top_logprobs
    whole.text_offset += gain.text_offset
    return whole
