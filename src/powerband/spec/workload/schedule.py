"""One drawing of a workload: every request with its time, its lengths and the text it shares with others."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from powerband.spec.quantities import count_text


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a prompt, about `tokens` long. Pieces with the same key begin with the same text."""

    key: str
    tokens: int
    text: str | None = None  # as it was recorded; None: made up from the key


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request of a schedule."""

    index: int
    segments: tuple[Segment, ...]
    output_tokens: int
    turn: int = 0  # 0 begins a conversation; the prompt of a later turn is the conversation so far and its own segments
    think_s: float = 0.0  # from the answer before it in its chain to its own arrival

    @property
    def new_tokens(self) -> int:
        """Of its own segments."""
        return sum(segment.tokens for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Chain:
    """Requests of which each waits for the answer to the one before: a conversation, or a user of a closed loop."""

    start_s: float
    requests: tuple[PlannedRequest, ...]


@dataclass(frozen=True, slots=True)
class LengthCut:
    """Requests that were too long for a context, see `fitting`."""

    max_model_len: int  # tokens of prompt and output together
    requests: int  # number of requests that were cut
    max_tokens: int  # of the longest of them before

    def text(self, num_requests: int) -> str:
        """'2 of 6 requests are longer than the context of 1,000 tokens'."""
        verb = "is" if self.requests == 1 else "are"
        whole = count_text(num_requests, "request")
        return f"{self.requests:,} of {whole} {verb} longer than the context of {self.max_model_len:,} tokens"


@dataclass(frozen=True, slots=True)
class Schedule:
    """Every request of a load, drawn before it begins."""

    seed: int
    chains: tuple[Chain, ...]  # by start
    duration_s: float  # no request arrives later; infinity: no limit
    cut: LengthCut | None = None  # None: every request is as long as it was drawn

    @property
    def num_requests(self) -> int:
        return sum(len(chain.requests) for chain in self.chains)

    @property
    def cut_text(self) -> str:
        """What was cut, in a sentence; '' for nothing."""
        if self.cut is None:
            return ""
        verb = "is" if self.cut.requests == 1 else "are"
        return f"{self.cut.text(self.num_requests)} (up to {self.cut.max_tokens:,}) and {verb} cut to fit it."

    def digest(self) -> str:
        """SHA-256 over every time (to the nanosecond), length, key and text: equal digests are equal schedules."""
        hasher = hashlib.sha256(f"{self.duration_s!r}".encode())
        for chain in self.chains:
            requests = [
                (r.index, r.turn, round(r.think_s, 9), r.output_tokens, [(s.key, s.tokens, s.text) for s in r.segments])
                for r in chain.requests
            ]
            hasher.update(json.dumps((round(chain.start_s, 9), requests)).encode())
        return hasher.hexdigest()
