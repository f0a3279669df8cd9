"""What happened to one request, and every latency figure that follows from it.

s scheduled arrival   a sent   c_1 ... c_m chunks that carry tokens       all on one monotonic clock
|---- send lag -------|        |
|------------- TTFT -----------|------- TPOT, ITL, stall -----|
|------------------------- E2E -------------------------------|
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from operator import sub


class Outcome(str, Enum):
    OK = "ok"
    ERROR = "error"
    REFUSED = "refused"
    TIMED_OUT = "timed_out"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One request, from a simulation, a load test or live traffic.

    `chunk_times_s[i]` is when `chunk_tokens[i]` (at least one) output tokens arrived together. A figure that the
    request did not get far enough to have is None.
    """

    scheduled_s: float
    sent_s: float
    chunk_times_s: tuple[float, ...] = ()
    chunk_tokens: tuple[int, ...] = ()
    outcome: Outcome = Outcome.OK
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    ended_s: float | None = None  # when an aborted request was abandoned; None: at its last chunk
    is_valid: bool | None = None  # whether the answer has the form that was asked for; None: not checked

    @property
    def send_lag_s(self) -> float:
        """a − s: how late the client was, no fault of the server's."""
        return self.sent_s - self.scheduled_s

    @property
    def ttft_s(self) -> float | None:
        """c_1 − s: free of coordinated omission, so this is the figure in verdicts."""
        return self.chunk_times_s[0] - self.scheduled_s if self.chunk_times_s else None

    @property
    def service_ttft_s(self) -> float | None:
        """c_1 − a."""
        return self.chunk_times_s[0] - self.sent_s if self.chunk_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """(c_m − c_1) / (n − 1) for n ≥ 2 output tokens; None otherwise, and an SLO on it is then met."""
        if self.output_tokens < 2 or not self.chunk_times_s:
            return None
        return (self.chunk_times_s[-1] - self.chunk_times_s[0]) / (self.output_tokens - 1)

    @property
    def stall_s(self) -> float | None:
        """The largest gap between two chunks."""
        return max(map(sub, self.chunk_times_s[1:], self.chunk_times_s), default=None)

    @property
    def e2e_s(self) -> float | None:
        """c_m − s."""
        return self.chunk_times_s[-1] - self.scheduled_s if self.chunk_times_s else None

    def gaps(self) -> Iterator[tuple[float, int]]:
        """(c_i − c_{i−1}, k_i) for each chunk after the first."""
        for (earlier_s, later_s), tokens in zip(pairwise(self.chunk_times_s), self.chunk_tokens[1:], strict=True):
            yield later_s - earlier_s, tokens

    def itl_samples_s(self) -> list[float]:
        """Inter-token latencies: a gap before k tokens counts as k samples of gap / k."""
        return [gap_s / tokens for gap_s, tokens in self.gaps() for _ in range(tokens)]


def pooled_itl_s(records: Iterable[RequestRecord]) -> list[float]:
    """The inter-token latencies of all requests together."""
    return [sample for record in records for sample in record.itl_samples_s()]


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 … 100) of raw samples, linear between neighbours as numpy's default; NaN for none."""
    if not 0 <= q <= 100:
        raise ValueError(f"a percentile lies between 0 and 100, not at {q}")
    if len(values) == 0:
        return math.nan
    ordered = sorted(values)
    position = (len(ordered) - 1) * (q / 100)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
