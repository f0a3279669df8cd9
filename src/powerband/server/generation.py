"""The engine requests behind one HTTP request (each prompt n times), and what they yield, as pieces of text."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field, replace

from starlette.types import Receive

from powerband.core.params import SamplingParams
from powerband.core.request import EngineRequest
from powerband.core.step import ErrorInfo, FinishReason, TokenLogprobs, TokenOutput
from powerband.engine.messages import RemoteError
from powerband.engine.output import OutputProcessor
from powerband.engine.stream import TokenStream
from powerband.errors import InvalidRequest, PowerbandError
from powerband.metrics.record import Outcome, RequestRecord
from powerband.server.prompts import Prompt
from powerband.server.protocol import GenerationRequest
from powerband.server.replica import Model, Replica
from powerband.server.replies import Finish, PromptTokensDetails, Usage
from powerband.spec.settings import EngineSettings
from powerband.web.edge import ClientLeft
from powerband.web.streaming import Departure


@dataclass(slots=True)
class Choice:
    """One engine request: its place in the answer, and its history for the metrics."""

    index: int
    prompt: Prompt
    request: EngineRequest
    processor: OutputProcessor
    num_tokens: int = 0
    num_cached: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    scheduled_s: float = 0.0
    times_s: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    @property
    def reason(self) -> Finish:
        """In OpenAI's words. Other ends than these two raise, and have no answer."""
        return "length" if self.finish_reason is FinishReason.LENGTH else "stop"


@dataclass(slots=True)
class Piece:
    """What one choice gained. The last piece of a choice has a finish reason."""

    choice: Choice
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason | None


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


class Generation:
    """Started, read until it is exhausted, and closed under all circumstances: `close` aborts what has not ended."""

    def __init__(
        self,
        replica: Replica,
        model: Model,
        body: GenerationRequest,
        prompts: list[Prompt],
        params: SamplingParams,
        arrival_s: float,
    ) -> None:
        check_scheduling(body, prompts, replica.engine_settings, refuses_late=model.info.refuses_late)
        self.id = uuid.uuid4().hex
        self.created_s = int(time.time())
        self.prompts = prompts
        self.params = params
        self.tokenizer = model.tokenizer
        self._replica = replica
        resumed = _resumed(body, prompts, model)
        self.choices: list[Choice] = []
        for prompt in prompts:
            for copy in range(params.n):
                own = _params_of_copy(params, copy)
                index = len(self.choices)
                request = EngineRequest(
                    id=f"{self.id}-{index}",
                    token_ids=prompt.token_ids,
                    params=own,
                    arrival_s=arrival_s,
                    priority=body.priority or 0,
                    tenant=body.user or "",
                    deadline_s=None if body.deadline_s is None else arrival_s + body.deadline_s,
                    cache_salt=body.cache_salt or "",
                    resumed_ids=resumed,
                )
                processor = OutputProcessor(model.tokenizer, own, prompt.token_ids)
                processor.resume(resumed)
                self.choices.append(Choice(index, prompt, request, processor, num_tokens=len(resumed)))
        self._by_id = {choice.request.id: choice for choice in self.choices}
        self._stream: TokenStream | None = None
        self._departure: Departure | None = None
        self._ahead: list[TokenOutput] = []

    async def start(self, receive: Receive) -> None:
        """Submit, and wait until the engine's first answer, so that a refusal can still become a status.

        Raises the refusal, EngineDead, or ClientLeft.
        """
        self._replica.begin()
        self._departure = Departure(receive)
        try:
            self._stream = self._replica.engine.submit([choice.request for choice in self.choices])
            self._departure.then(self._stream.close)
            self._ahead = await self._take()
            for output in self._ahead:
                _raise_error(output.error)
        except PowerbandError:
            for choice in self.choices:  # refused, so none of them counts as a request that ended
                choice.finish_reason = FinishReason.ERROR
            raise

    async def pieces(self) -> list[Piece]:
        """What came since the last call; empty at the end. Raises ClientLeft, and the error that a request met."""
        while outputs := self._ahead or await self._take():
            self._ahead = []
            pieces = [piece for output in outputs if (piece := self._piece(output)) is not None]
            if pieces:
                return pieces
        return []

    def usage(self) -> Usage:
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        completion_tokens = sum(choice.num_tokens for choice in self.choices)
        cached = sum(choice.num_cached for choice in self.choices[:: self.params.n])
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached),
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
        if self._departure is None or self._departure.left:
            raise ClientLeft
        return outputs

    def _piece(self, output: TokenOutput) -> Piece | None:
        choice = self._by_id[output.id]
        if choice.finish_reason is not None:  # it met a stop string, and this is what was under way
            return None
        self._record(choice, output)
        if output.error is not None:
            self._finish(choice, FinishReason.ERROR)
            _raise_error(output.error)
        result = choice.processor.process(output)
        choice.num_tokens += len(result.token_ids)
        if output.prompt_logprobs:
            choice.prompt_logprobs += output.prompt_logprobs
        if result.finish_reason is not None:
            if result.must_abort and self._stream is not None:
                self._stream.close([output.id])
            choice.stop_reason = result.stop_reason
            self._finish(choice, result.finish_reason)
        elif not result.text and not result.token_ids:
            return None
        return Piece(choice, result.text, result.token_ids, result.logprobs, result.finish_reason)

    # ---- metrics

    def _record(self, choice: Choice, output: TokenOutput) -> None:
        choice.num_cached = max(choice.num_cached, output.num_cached_tokens)
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

    def _finish(self, choice: Choice, reason: FinishReason) -> None:
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


def _resumed(body: GenerationRequest, prompts: list[Prompt], model: Model) -> list[int]:
    """The output to go on after. Raises InvalidRequest where there is not exactly one to go on with."""
    resumed = body.resume_token_ids or []
    if resumed and (len(prompts) > 1 or (body.n or 1) > 1 or body.prompt_logprobs is not None):
        raise InvalidRequest(
            "resume_token_ids goes with one prompt, n = 1 and no prompt_logprobs.", param="resume_token_ids"
        )
    wrong = next((id for id in resumed if id >= model.info.vocab_size), None)
    if wrong is not None:
        raise InvalidRequest(f"Token {wrong} does not exist in this model.", param="resume_token_ids")
    return resumed


def _params_of_copy(params: SamplingParams, copy: int) -> SamplingParams:
    """Copies of one prompt with a seed take seeds in a row, or they would all be the same."""
    seed = None if params.seed is None else (params.seed + copy + 2**63) % 2**64 - 2**63
    return replace(params, n=1, seed=seed)


def _raise_error(error: ErrorInfo | None) -> None:
    if error is not None:
        raise RemoteError(error)
