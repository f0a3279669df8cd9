"""The engine requests behind one HTTP request (each prompt n times), and what they yield, as pieces of text."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import ParamSpec, TypeVar

from msgspec import UNSET
from starlette.types import Receive

from powerband.core.params import SamplingParams
from powerband.core.request import OUTPUT_COMPLETE, EngineRequest
from powerband.core.step import ErrorInfo, FinishReason, TokenLogprobs, TokenOutput
from powerband.engine.client.messages import RemoteError
from powerband.engine.client.output import OutputProcessor
from powerband.engine.client.output_reader import OutputReader, certain
from powerband.engine.client.stream import TokenStream
from powerband.errors import InvalidRequest, PowerbandError
from powerband.metrics.record import Outcome, RequestRecord
from powerband.output_parsers.events import Content, Event
from powerband.server.generation.prompts import Prompt
from powerband.server.protocol import GenerationRequest
from powerband.server.replica import Model, ServerState
from powerband.server.replies import CompletionTokensDetails, Finish, PromptTokensDetails, Usage
from powerband.spec.settings import EngineSettings
from powerband.web.client_connection import ClientDisconnected
from powerband.web.streaming import DisconnectWatcher

P = ParamSpec("P")
T = TypeVar("T")
_TURN_S = 0.005  # for which one request may keep the event loop
MAX_PROMPT_LOGPROBS = 1 << 20  # of all prompts of a request, some 30 MB of JSON
MAX_OUTPUT_LOGPROBS = 1 << 22  # of all its choices, where there are several
_MAX_PIECES = 16  # written at once
_ROWS_OF_PIECE = 16  # of a prompt's log-probabilities: writing one takes some 20 µs


@dataclass(slots=True)
class ChoiceState:
    """One engine request: its place in the answer, and its history for the metrics."""

    index: int
    prompt: Prompt
    request: EngineRequest
    processor: OutputProcessor
    num_tokens: int = 0
    num_cached: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    scheduled_s: float = 0.0
    times_s: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)  # all of it, while its reasoning has a budget
    was_continued: bool = False  # by a request that found most of it computed

    @property
    def reason(self) -> Finish:
        """OpenAI's finish_reason. All other ends raise an error instead."""
        if self.finish_reason is FinishReason.LENGTH:
            return "length"
        parser = self.processor.parser
        return "tool_calls" if parser is not None and parser.num_calls else "stop"


@dataclass(slots=True)
class OutputPiece:
    """What one choice gained. The last piece of a choice has a finish reason. Rows of its prompt come first.

    events: what the text means; without a parser all of it is content.
    """

    choice: ChoiceState
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)


def check_scheduling(
    body: GenerationRequest, prompts: list[Prompt], settings: EngineSettings, *, refuses_late: bool
) -> None:
    """Raise InvalidRequest for what would have no effect under this policy, or could never be in the queue at once.

    refuses_late: the engine refuses what cannot be in time, under any policy.
    """
    num_choices = (body.n or 1) * len(prompts)
    num_places = settings.max_num_seqs + settings.max_num_queued_reqs
    if num_choices > num_places:
        raise InvalidRequest(
            f"All prompts, n times, are {num_choices} choices; {num_places} can run and wait at once.",
            hint="Send fewer at a time.",
            param="n" if len(prompts) == 1 else "prompt",
        )
    num_tokens = (body.n or 1) * sum(len(prompt.token_ids) for prompt in prompts)
    if num_choices > 1 and num_tokens > settings.max_num_queued_tokens:
        raise InvalidRequest(
            f"All prompts, n times, have {num_tokens} tokens; the queue holds {settings.max_num_queued_tokens}.",
            hint="Send fewer prompts at a time.",
            param="prompt",
        )
    for name, needed in (("priority", "priority"), ("deadline_s", "deadline")):
        has_effect = settings.scheduling_policy == needed or (name == "deadline_s" and refuses_late)
        if getattr(body, name) and not has_effect:
            raise InvalidRequest(
                f"'{name}' has no effect with the scheduling policy '{settings.scheduling_policy}'.",
                hint=f"Leave it out, or start the server with --scheduling-policy {needed}."
                + (" A calibrated engine checks deadlines, too." if name == "deadline_s" else ""),
                param=name,
            )


def check_logprobs(params: SamplingParams, prompts: list[Prompt]) -> None:
    """Raise InvalidRequest for more log-probabilities than an answer is to hold. `params` are complete.

    A single choice may have all of its own tokens' at any length: they come no faster than they are computed.
    """
    num_choices = params.n * len(prompts)
    if params.prompt_logprobs is not None:
        num_tokens = params.n * sum(len(prompt.token_ids) for prompt in prompts)
        _check_count("prompt_logprobs", num_tokens, params.prompt_logprobs, MAX_PROMPT_LOGPROBS)
    if params.logprobs is not None and num_choices > 1:
        _check_count("logprobs", num_choices * (params.max_tokens or 0), params.logprobs, MAX_OUTPUT_LOGPROBS)


def _check_count(name: str, num_tokens: int, alternatives: int, limit: int) -> None:
    count = num_tokens * (1 + alternatives)
    if count > limit:
        raise InvalidRequest(
            f"{num_tokens} tokens of all choices with {1 + alternatives} log-probabilities each are {count}; "
            f"the limit for one request is {limit}.",
            hint="Send fewer prompts or choices at a time, or ask for fewer alternatives.",
            param=name,
        )


class Generation:
    """Started, read until it is exhausted, and closed under all circumstances: `close` aborts what has not ended."""

    def __init__(
        self,
        replica: ServerState,
        model: Model,
        body: GenerationRequest,
        prompts: list[Prompt],
        params: SamplingParams,
        arrival_s: float,
        reader: OutputReader | None = None,
    ) -> None:
        check_scheduling(body, prompts, replica.engine_settings, refuses_late=model.info.refuses_late)
        check_logprobs(params, prompts)
        self.id = uuid.uuid4().hex
        self.created_s = int(time.time())
        self.prompts = prompts
        self.params = params
        self.tokenizer = model.tokenizer
        self._replica = replica
        self._reader = reader or OutputReader()
        self._reasons = bool(self._reader.format.reasoning)
        self.resumed = resumed = _resumed(body, prompts, params, model)
        deadline_s = None if body.deadline_s is None else arrival_s + body.deadline_s
        each = [params.for_choice(copy) for copy in range(params.n)]
        adapter = replica.adapter(body.model)
        self.choices: list[ChoiceState] = []
        for prompt in prompts:
            for own in each:
                index = len(self.choices)
                request = EngineRequest(
                    id=f"{self.id}-{index}",
                    token_ids=prompt.token_ids,
                    params=own,
                    arrival_s=arrival_s,
                    priority=body.priority or 0,
                    tenant=body.user or "",
                    deadline_s=deadline_s,
                    cache_salt=body.cache_salt or "",
                    resumed_ids=resumed,
                    adapter=adapter.info.digest if adapter is not None else "",
                )
                processor = self._reader.processor(model.tokenizer, own, prompt.token_ids)
                choice = ChoiceState(index, prompt, request, processor, num_tokens=len(resumed))
                choice.output_ids += resumed
                self.choices.append(choice)
        self._by_id = {choice.request.id: choice for choice in self.choices}
        self._num_tokens = len(resumed)  # of all choices
        self._gives_output = body.max_tokens != 0
        self._num_cached = 0  # prompt tokens of the first choice of each prompt
        self._num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self._stream: TokenStream | None = None
        self._departure: DisconnectWatcher | None = None
        self._ahead: list[TokenOutput] = []
        self._coming: Iterator[OutputPiece] = iter(())
        self._turn_s = 0.0  # when this request's turn with the event loop began

    async def start(self, receive: Receive) -> None:
        """Submit, and wait until the engine's first answer, so that a refusal can still become a status.

        Raises the refusal, EngineDead, or ClientDisconnected.
        """
        self._replica.begin()
        self._departure = DisconnectWatcher(receive)
        try:
            if self.resumed:  # may be as long as the context: not in the event loop
                await self.in_thread(self.choices[0].processor.resume, self.resumed)
            self._coming = iter([piece for choice in self.choices for piece in self._end_reasoning(choice)])
            unfinished = [choice.request for choice in self.choices if choice.finish_reason is None]
            self._stream = self._replica.engine.submit(unfinished)
            self._departure.then(self._stream.close)
            self._ahead = await self._take()
            for output in self._ahead:
                _raise_error(output.error)
        except PowerbandError:
            for choice in self.choices:  # refused, so none of them counts as a request that ended
                choice.finish_reason = FinishReason.ERROR
            raise

    async def pieces(self) -> list[OutputPiece]:
        """The next pieces; empty at the end. Raises ClientDisconnected, and the error of a request.

        Other requests get the event loop in between, however much arrived.
        """
        while not (pieces := list(islice(self._coming, _MAX_PIECES))):
            outputs = self._ahead or await self._take()
            self._ahead = []
            if not outputs:
                return []
            self._coming = (piece for output in outputs for piece in self._pieces(output))
            self._turn_s = time.perf_counter()
        if time.perf_counter() - self._turn_s > _TURN_S:
            await asyncio.sleep(0)
            self._check_client()
            self._turn_s = time.perf_counter()
        return pieces

    async def in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a slow function in a thread, so that the event loop goes on."""
        return await self._replica.in_thread(function, *args, **kwargs)

    def usage(self) -> Usage:
        """The tokens that the client gets: none of the output with max_tokens 0, for which one is computed."""
        num_tokens = self._num_tokens if self._gives_output else 0
        parsers = [choice.processor.parser for choice in self.choices]
        num_reasoning = sum(parser.num_reasoning_tokens for parser in parsers if parser is not None)
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=num_tokens,
            total_tokens=self._num_prompt_tokens + num_tokens,
            prompt_tokens_details=PromptTokensDetails(self._num_cached),
            completion_tokens_details=CompletionTokensDetails(num_reasoning) if self._reasons else UNSET,
        )

    def close(self) -> None:
        if self._departure is None:
            return
        self._departure.close()
        self._departure = None
        if self._stream is not None:
            self._stream.close()
        for choice in self.choices:
            if choice.finish_reason is None:
                self._finish(choice, FinishReason.ABORT)
        self._replica.end()

    async def _take(self) -> list[TokenOutput]:
        outputs = await self._stream.take() if self._stream else []
        self._check_client()
        return outputs

    def _check_client(self) -> None:
        if self._departure is None or self._departure.left:
            raise ClientDisconnected

    def _pieces(self, output: TokenOutput) -> Iterator[OutputPiece]:
        choice = self._by_id.get(output.id)
        if choice is None or choice.finish_reason is not None:  # it met a stop string, and this is what was under way
            return
        self._record(choice, output)
        if output.error is not None:
            self._finish(choice, FinishReason.ERROR)
            _raise_error(output.error)
        rows = output.prompt_logprobs or []
        for start in range(0, len(rows), _ROWS_OF_PIECE):
            yield OutputPiece(choice, prompt_logprobs=rows[start : start + _ROWS_OF_PIECE])
        for part in self._reader.parts(output):
            yield from self._piece(choice, part)
            if choice.finish_reason is None and (forced := list(self._end_reasoning(choice))):
                yield from forced
                if choice.finish_reason is None:
                    self._continue(choice, output.id)
                return

    def _piece(self, choice: ChoiceState, output: TokenOutput) -> Iterator[OutputPiece]:
        result = choice.processor.process(output)
        choice.num_tokens += len(result.token_ids)
        self._num_tokens += len(result.token_ids)
        if self._reader.budget is not None:
            choice.output_ids += result.token_ids
        if result.finish_reason is not None:
            if result.must_abort and self._stream is not None:
                self._stream.close([output.id])
            choice.stop_reason = result.stop_reason
            self._finish(choice, result.finish_reason)
        elif not result.text and not result.token_ids:
            return
        events = result.events
        if choice.processor.parser is None and result.text:
            events = [Content(result.text)]
        yield OutputPiece(choice, result.text, result.token_ids, result.logprobs, result.finish_reason, events=events)

    # ---- the budget of reasoning tokens

    def _end_reasoning(self, choice: ChoiceState) -> Iterator[OutputPiece]:
        """Add the text that ends the reasoning, where its budget is spent, unless the answer has no room for it."""
        ids = self._reader.end_of_reasoning(choice.processor, self.tokenizer)
        if not ids or choice.num_tokens + len(ids) >= (choice.request.params.max_tokens or 0):
            return
        rows = certain(ids) if self.params.logprobs is not None else None
        parser = choice.processor.parser
        num_reasoning = 0 if parser is None else parser.num_reasoning_tokens
        yield from self._piece(choice, TokenOutput(choice.request.id, ids, time.monotonic(), logprobs=rows))
        if parser is not None:  # the text that ends the reasoning is none
            parser.num_reasoning_tokens = num_reasoning
        choice.request = replace(choice.request, resumed_ids=choice.output_ids)

    def _continue(self, choice: ChoiceState, id: str) -> None:
        """Let the engine go on from what the choice has now, in place of the request that was under way."""
        if self._stream is None:
            return
        self._stream.close([id])
        del self._by_id[id]
        params = replace(choice.request.params, prompt_logprobs=None)  # the client has them
        choice.request = replace(choice.request, id=f"{id}-continued", params=params)
        choice.was_continued = True
        self._by_id[choice.request.id] = choice
        self._replica.engine.submit([choice.request], self._stream)

    # ---- metrics

    def _record(self, choice: ChoiceState, output: TokenOutput) -> None:
        if output.num_cached_tokens > choice.num_cached and not choice.was_continued:
            if choice.index % self.params.n == 0:
                self._num_cached += output.num_cached_tokens - choice.num_cached
            choice.num_cached = output.num_cached_tokens
        choice.scheduled_s = output.scheduled_s or choice.scheduled_s
        count = len(output.token_ids)
        if not count:
            return
        if choice.times_s:
            self._replica.metrics.observe_tokens(count, gap_s=output.time_s - choice.times_s[-1])
        else:
            self._replica.metrics.observe_first_tokens(
                count,
                ttft_s=output.time_s - choice.request.arrival_s,
                prompt_tokens=len(choice.prompt.token_ids),
            )
        choice.times_s.append(output.time_s)
        choice.counts.append(count)

    def _finish(self, choice: ChoiceState, reason: FinishReason) -> None:
        choice.finish_reason = reason
        outcome = {FinishReason.ABORT: Outcome.ABORTED, FinishReason.ERROR: Outcome.ERROR}.get(reason, Outcome.OK)
        record = RequestRecord(
            scheduled_s=choice.request.arrival_s,
            sent_s=choice.request.arrival_s,
            chunk_times_s=tuple(choice.times_s),
            chunk_tokens=tuple(choice.counts),
            outcome=outcome,
            prompt_tokens=len(choice.prompt.token_ids),
            output_tokens=sum(choice.counts),
            cached_tokens=choice.num_cached,
        )
        self._replica.metrics.observe_request(
            record, finished_reason=reason.value, first_scheduled_s=choice.scheduled_s
        )


def _resumed(body: GenerationRequest, prompts: list[Prompt], params: SamplingParams, model: Model) -> list[int]:
    """The output to continue. Raises InvalidRequest unless there is exactly one choice to continue.

    Cheap: output that can be continued is shorter than the context.
    """
    resumed = body.resume_token_ids or []
    if not resumed:
        return resumed
    if len(prompts) > 1 or (body.n or 1) > 1 or body.prompt_logprobs is not None:
        raise InvalidRequest(
            "resume_token_ids goes with one prompt, n = 1 and no prompt_logprobs.", param="resume_token_ids"
        )
    if params.max_tokens is not None and len(resumed) >= params.max_tokens:
        raise InvalidRequest(
            f"{len(resumed)} tokens are to be resumed, but max_tokens is {params.max_tokens}: the output is complete.",
            param="resume_token_ids",
            code=OUTPUT_COMPLETE,
        )
    wrong = max(resumed)
    if wrong >= model.info.vocab_size:
        raise InvalidRequest(f"Token {wrong} does not exist in this model.", param="resume_token_ids")
    return resumed


def _raise_error(error: ErrorInfo | None) -> None:
    if error is not None:
        raise RemoteError(error)
