"""Clients of a simulation: they send what a schedule says, wait for answers where it says so, and keep records.

The text of a prompt is made up of token ids that follow from its segments' keys, so that what is shared is found in the
prefix cache, and a later turn repeats everything that was said before it, answers included.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from powerband.core.params import SamplingParams
from powerband.core.request import EngineRequest
from powerband.core.step import FinishReason, TokenOutput
from powerband.metrics.record import Outcome, RequestRecord
from powerband.spec.workload.workload import Chain, PlannedRequest, Segment

_SPAN = 1 << 31  # token ids are 32 bits wide; a text counts up from a number below this


@lru_cache(maxsize=1 << 16)
def output_start(id: str) -> int:
    """The token at position p of a request, where it is part of the answer, has the id `answer_start + p`."""
    return zlib.crc32(b"answer" + id.encode()) % _SPAN


def request_id(index: int) -> str:
    """Of requests that come at once, the scheduler serves that with the lower id first."""
    return f"{index:07d}"


def segment_tokens(segment: Segment) -> range:
    """Equal keys begin with equal tokens."""
    start = zlib.crc32(segment.key.encode()) % _SPAN
    return range(start, start + segment.tokens)


@dataclass(slots=True)
class SimulatedRequest:
    """A request that is under way. Times as the client sees them."""

    planned: PlannedRequest
    chain: int
    sent_s: float
    prompt_tokens: int
    replica: int
    answer_s: float  # from a step's end until its tokens are here
    answer_request_s: float  # more, for each request in the step
    times_s: array[float] = field(default_factory=lambda: array("d"))
    chunks: array[int] = field(default_factory=lambda: array("i"))
    num_cached: int = 0

    @property
    def tokens(self) -> int:
        """Prompt and asked answer together."""
        return self.prompt_tokens + self.planned.output_tokens

    def lag_s(self, requests: int) -> float:
        """From a step's end to here."""
        return self.answer_s + self.answer_request_s * requests

    def on_output(self, output: TokenOutput, requests: int) -> None:
        """requests: in its step."""
        if output.token_ids:
            self.times_s.append(output.time_s + self.lag_s(requests))
            self.chunks.append(len(output.token_ids))
            self.num_cached = output.num_cached_tokens

    def on_run(self, times_s: Iterable[float], num_cached: int, requests: int) -> None:
        """One token at each of these times."""
        lag_s = self.lag_s(requests)
        self.times_s.extend(time_s + lag_s for time_s in times_s)
        self.chunks.extend([1] * (len(self.times_s) - len(self.chunks)))
        self.num_cached = num_cached

    def record(self, reason: FinishReason | None) -> RequestRecord:
        """reason: None: it was not waited for."""
        outcome = Outcome.OK if reason in (FinishReason.LENGTH, FinishReason.STOP) else Outcome.REFUSED
        return RequestRecord(
            scheduled_s=self.sent_s,
            sent_s=self.sent_s,
            chunk_times_s=tuple(self.times_s),
            chunk_tokens=tuple(self.chunks),
            outcome=Outcome.TIMED_OUT if reason is None else outcome,
            prompt_tokens=self.prompt_tokens,
            output_tokens=sum(self.chunks),
            cached_tokens=self.num_cached,
        )


class ConversationClient:
    """One chain: where it stands, and what was said so far."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.position = 0
        self._history: list[int] = []
        self._has_failed = False  # an answer of the conversation: it cannot go on

    @property
    def next(self) -> PlannedRequest | None:
        return self.chain.requests[self.position] if self.position < len(self.chain.requests) else None

    @property
    def session(self) -> str:
        """'' for a question of its own: nothing is gained by asking the same replica again."""
        planned, after = self.chain.requests[self.position], self.position + 1
        has_more = after < len(self.chain.requests) and self.chain.requests[after].turn > 0
        return f"{planned.index - planned.turn}" if planned.turn or has_more else ""

    @property
    def prompt_tokens(self) -> int:
        """Of the next request."""
        planned = self.chain.requests[self.position]
        return planned.new_tokens + (len(self._history) if planned.turn else 0)

    def next_request(self, arrival_s: float) -> EngineRequest:
        """The next request as an engine takes it, which knows it from `arrival_s` on."""
        planned = self.chain.requests[self.position]
        prompt = self._history if planned.turn else []
        for segment in planned.segments:
            prompt.extend(segment_tokens(segment))
        self._history = prompt
        params = SamplingParams(max_tokens=planned.output_tokens, ignore_eos=True)
        return EngineRequest(id=request_id(planned.index), token_ids=prompt, params=params, arrival_s=arrival_s)

    def on_complete(self, record: RequestRecord) -> None:
        """The answer is here: on to the next request that can be sent at all."""
        planned = self.chain.requests[self.position]
        start = output_start(request_id(planned.index)) + len(self._history)
        self._history.extend(range(start, start + record.output_tokens))
        self._has_failed = record.outcome is not Outcome.OK
        self.position += 1
        while self._has_failed and self.next is not None and self.next.turn:
            self.position += 1
