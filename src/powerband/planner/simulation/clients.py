"""Clients of a simulation: they send what a schedule says, wait for answers where it says so, and keep records.

The text of a prompt is made up of token ids that follow from its segments' keys, so that shared text is found in the
prefix cache, and a later turn repeats everything that was said before it, answers included. The dispatcher's keys of a
prompt follow from the same segments.
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
from powerband.dispatch.backend import InFlightRequest
from powerband.dispatch.estimates import BYTES_PER_TOKEN
from powerband.dispatch.prefix import BLOCK_ENDS
from powerband.metrics.record import Outcome, RequestRecord
from powerband.spec.workload.schedule import Chain, PlannedRequest, Segment

_BLOCK_ENDS = tuple(end // BYTES_PER_TOKEN for end in BLOCK_ENDS)  # in tokens
_SPAN = 1 << 31  # token ids are 32 bits wide; a text counts up from a number below this


@lru_cache(maxsize=1 << 16)
def output_start(id: str) -> int:
    """The token at position p of a request, where it is part of the answer, has the id `output_start + p`."""
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
    """A request that a client has sent. Times as the client sees them."""

    planned: PlannedRequest
    chain: int
    sent_s: float
    prompt_tokens: int
    placed: InFlightRequest | None = None  # None: it waits in the queue
    answer_s: float = 0.0  # from a step's end until its tokens are at the client
    answer_request_s: float = 0.0  # more, for each request in the step
    has_first_token: bool = False
    times_s: array[float] = field(default_factory=lambda: array("d"))
    chunks: array[int] = field(default_factory=lambda: array("i"))
    num_cached: int = 0

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
        """reason: None: the simulation ended before."""
        if reason is None:
            return self._record(Outcome.TIMED_OUT)
        return self._record(Outcome.OK if reason in (FinishReason.LENGTH, FinishReason.STOP) else Outcome.REFUSED)

    def refused(self) -> RequestRecord:
        """By the gateway."""
        return self._record(Outcome.REFUSED)

    def _record(self, outcome: Outcome) -> RequestRecord:
        return RequestRecord(
            scheduled_s=self.sent_s,
            sent_s=self.sent_s,
            chunk_times_s=tuple(self.times_s),
            chunk_tokens=tuple(self.chunks),
            outcome=outcome,
            prompt_tokens=self.prompt_tokens,
            output_tokens=sum(self.chunks),
            cached_tokens=self.num_cached,
        )


class _PrefixKeys:
    """Keys of the whole blocks of a text that grows, as `dispatch.prefix` cuts them: equal texts have equal keys.

    A block's key is the hash of the key before it and of the runs of token ids in it, not of every token.
    """

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self._parts: list[int] = []  # of the block that is not whole: the first id and the length of each run
        self._num_tokens = 0

    def extend(self, tokens: range) -> None:
        start, left = tokens.start, len(tokens)
        while left and len(self.keys) < len(_BLOCK_ENDS):
            taken = min(left, _BLOCK_ENDS[len(self.keys)] - self._num_tokens)
            self._parts += start, taken
            self._num_tokens += taken
            start, left = start + taken, left - taken
            if self._num_tokens == _BLOCK_ENDS[len(self.keys)]:
                before = self.keys[-1] if self.keys else b""
                chained = hash((int.from_bytes(before, "little"), *self._parts))  # of integers: the same in any process
                self.keys.append(chained.to_bytes(8, "little", signed=True))
                self._parts = []


class ConversationClient:
    """One chain: where it stands, and what was said so far."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.position = 0
        self._history: list[int] = []
        self._keys = _PrefixKeys()
        self._has_failed = False  # an answer of the conversation: it cannot go on

    @property
    def next(self) -> PlannedRequest | None:
        return self.chain.requests[self.position] if self.position < len(self.chain.requests) else None

    @property
    def prompt_tokens(self) -> int:
        """Of the next request."""
        planned = self.chain.requests[self.position]
        return planned.new_tokens + (len(self._history) if planned.turn else 0)

    def prefix_keys(self) -> tuple[bytes, ...]:
        """Of the next request's prompt, once for each request."""
        planned = self.chain.requests[self.position]
        if not planned.turn:
            self._keys = _PrefixKeys()
        for segment in planned.segments:
            self._keys.extend(segment_tokens(segment))
        return tuple(self._keys.keys)

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
        answer = range(start, start + record.output_tokens)
        self._history.extend(answer)
        self._keys.extend(answer)
        self._has_failed = record.outcome is not Outcome.OK
        self.position += 1
        while self._has_failed and self.next is not None and self.next.turn:
            self.position += 1
