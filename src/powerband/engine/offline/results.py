"""What `LLM` returns, in vLLM's shape, and how it grows from the engine's outputs. No torch here."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

from powerband.core.params import SamplingParams
from powerband.core.request import EngineRequest
from powerband.core.step import ErrorInfo, FinishReason, TokenLogprobs, TokenOutput
from powerband.engine.client.output import OutputDelta, OutputProcessor
from powerband.engine.client.output_reader import OutputReader, certain
from powerband.metrics.record import Outcome, RequestRecord
from powerband.openai.tools import ToolCall
from powerband.output_parsers.events import Event
from powerband.output_parsers.message import ParsedMessage
from powerband.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token at one position. `rank` 1 is the most likely."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of the n answers to a prompt.

    finish_reason: "stop" (EOS, stop token or stop string), "length", "abort" or "error"; `error` says more of the last.
    `stop_reason`: the stop string or stop token; None for EOS. `logprobs`: per token, the alternatives by token id.

    Of a chat's answer, `content`, `reasoning_content` and `tool_calls` say what `text` means. Where it calls tools,
    `finish_reason` is "tool_calls", and `content` is None unless there is text beside the calls.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None
    error: ErrorInfo | None = None
    metrics: RequestRecord | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt and its answers. `prompt_logprobs[0]` is None: nothing predicts the first token."""

    request_id: str
    prompt: str | None  # None: it was given as token ids
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int


@dataclass(slots=True)
class Answer:
    """One of the n answers while it grows: an engine request, and what came of it so far."""

    index: int
    request: EngineRequest
    processor: OutputProcessor
    reader: OutputReader = field(default_factory=OutputReader)
    is_chat: bool = False
    events: list[Event] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    last: OutputDelta = field(default_factory=OutputDelta)

    @property
    def finished(self) -> bool:
        return self.last.finish_reason is not None

    def add(self, output: TokenOutput) -> OutputDelta:
        """Add an output of the engine; outputs after the end are ignored."""
        if self.finished:
            return OutputDelta()
        delta = self.last = self.processor.process(output)
        self.text.append(delta.text)
        self.events += delta.events
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.prompt_logprobs += output.prompt_logprobs or []
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        if delta.token_ids:
            self.times_s.append(output.time_s)
            self.counts.append(len(delta.token_ids))
        return delta

    def end_reasoning(self, tokenizer: Tokenizer | None) -> bool:
        """Add the text that ends the reasoning, where its budget is spent, unless the answer has no room for it.

        True: then the engine has to go on from there, by `request`, in place of the one under way.
        """
        ids = [] if self.finished else self.reader.end_of_reasoning(self.processor, tokenizer)
        request, parser = self.request, self.processor.parser
        if not ids or parser is None or len(self.token_ids) + len(ids) >= (request.params.max_tokens or 0):
            return False
        num_reasoning = parser.num_reasoning_tokens
        rows = certain(ids) if request.params.logprobs is not None else None
        self.add(TokenOutput(request.id, ids, time.monotonic(), logprobs=rows))
        parser.num_reasoning_tokens = num_reasoning  # the text that ends the reasoning is none
        if self.finished:  # it has a stop string
            return False
        params = replace(request.params, prompt_logprobs=None) if self.prompt_logprobs else request.params
        ahead = list(self.token_ids)
        self.request = replace(request, id=f"{request.id}-continued", params=params, resumed_ids=ahead)
        return True

    def completion(self, tokenizer: Tokenizer | None) -> CompletionOutput:
        asked = self.request.params.logprobs is not None
        reason = self.last.finish_reason
        meaning = self._meaning() if self.is_chat else {}
        calls = reason is FinishReason.STOP and meaning.get("tool_calls")
        return CompletionOutput(
            index=self.index,
            text="".join(self.text),
            token_ids=self.token_ids,
            cumulative_logprob=sum(row.logprobs[0] for row in self.logprobs) if asked else None,
            logprobs=[logprobs_by_id(row, tokenizer) for row in self.logprobs] if asked else None,
            finish_reason="tool_calls" if calls else None if reason is None else reason.value,
            stop_reason=self.last.stop_reason,
            error=self.last.error,
            metrics=self._record(),
            **meaning,
        )

    def _meaning(self) -> dict[str, Any]:
        """content, reasoning_content and tool_calls, as far as there are any."""
        if self.processor.parser is None:
            return {"content": "".join(self.text)}
        message = ParsedMessage(self.events)
        return {
            "content": message.content,
            "reasoning_content": message.reasoning,
            "tool_calls": message.tool_calls,
        }

    def _record(self) -> RequestRecord:
        ends = {FinishReason.ERROR: Outcome.ERROR, FinishReason.ABORT: Outcome.ABORTED}
        return RequestRecord(
            scheduled_s=self.request.arrival_s,
            sent_s=self.request.arrival_s,
            chunk_times_s=tuple(self.times_s),
            chunk_tokens=tuple(self.counts),
            outcome=ends.get(self.last.finish_reason or FinishReason.ABORT, Outcome.OK),
            prompt_tokens=len(self.request.token_ids),
            output_tokens=len(self.token_ids),
            cached_tokens=self.num_cached_tokens,
        )


@dataclass(slots=True)
class PromptGroup:
    """A prompt and its n answers."""

    id: str
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    answers: list[Answer]

    def result(self, tokenizer: Tokenizer | None) -> RequestOutput:
        first = self.answers[0]
        prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if self.params.prompt_logprobs is not None and first.last.error is None:
            prompt_logprobs = [None, *(logprobs_by_id(row, tokenizer) for row in first.prompt_logprobs)]
        return RequestOutput(
            request_id=self.id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=[answer.completion(tokenizer) for answer in self.answers],
            finished=all(answer.finished for answer in self.answers),
            num_cached_tokens=first.num_cached_tokens,
        )


def logprobs_by_id(row: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """The actual token first, then the likeliest ones."""
    ranks = [row.rank, *range(1, len(row.token_ids))]
    by_id: dict[int, Logprob] = {}
    for id, logprob, rank in zip(row.token_ids, row.logprobs, ranks, strict=True):
        text = None if tokenizer is None else tokenizer.token_bytes(id).decode("utf-8", "replace")
        by_id.setdefault(id, Logprob(logprob, rank, text))
    return by_id
