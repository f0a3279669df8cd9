"""The last minute of traffic: arrivals, failures, cache hits, lengths and latencies. Times on one clock."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import fmean, median

from powerband.gateway.observability.slo import has_first_token
from powerband.gateway.request import CompletedRequest
from powerband.gateway.snapshot import PoolSnapshot
from powerband.metrics.record import Outcome

MAX_AGE_S = 60.0
_FAILED = (Outcome.ERROR, Outcome.TIMED_OUT)


@dataclass(frozen=True, slots=True)
class RequestSample:
    """The figures of a completed request that are kept."""

    time_s: float
    outcome: Outcome
    status: int
    error: str
    replica: str  # the last one; '': none
    failures: tuple[tuple[str, str], ...]  # replicas that failed it, with error codes; a retry may have succeeded
    is_single_replica: bool  # one replica answered it from start to end
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    queue_s: float
    ttft_s: float | None
    tpot_s: float | None

    @classmethod
    def from_completed(cls, completed: CompletedRequest, time_s: float) -> RequestSample:
        record, tried = completed.record, completed.replicas
        is_streamed = has_first_token(completed)
        failures = completed.failed
        if record.outcome in _FAILED and tried and tried[-1] not in dict(failures):
            failures = (*failures, (tried[-1], completed.error or record.outcome.value))
        return cls(
            time_s,
            record.outcome,
            completed.status,
            completed.error,
            tried[-1] if tried else "",
            failures,
            len(tried) == 1,
            record.prompt_tokens,
            record.cached_tokens,
            record.output_tokens,
            completed.queue_s,
            record.ttft_s if is_streamed else None,
            record.tpot_s if is_streamed else None,
        )


@dataclass(slots=True)
class RecentTraffic:
    _samples: deque[RequestSample] = field(default_factory=deque)
    _in_system: deque[tuple[float, int]] = field(default_factory=deque)  # (time, requests queued or in flight)
    _first_s: float | None = None

    def add(self, samples: Iterable[RequestSample], pools: Iterable[PoolSnapshot], clock_s: float) -> None:
        if self._first_s is None:
            self._first_s = clock_s
        self._samples.extend(samples)
        in_system = sum(pool.queued + sum(replica.inflight for replica in pool.replicas) for pool in pools)
        self._in_system.append((clock_s, in_system))
        while self._samples and self._samples[0].time_s < clock_s - MAX_AGE_S:
            self._samples.popleft()
        while self._in_system[0][0] < clock_s - MAX_AGE_S:
            self._in_system.popleft()

    def within(self, clock_s: float, window_s: float) -> Iterator[RequestSample]:
        """Requests that completed in the window, the latest first."""
        for sample in reversed(self._samples):
            if sample.time_s < clock_s - window_s:
                return
            yield sample

    def arrivals(self, clock_s: float, window_s: float) -> tuple[int, float]:
        """(requests that arrived in the window, its length in seconds, which is less soon after the start).

        Arrivals are completions plus the growth of the number of requests in the system.
        """
        first_s = max(clock_s - window_s, self._first_s if self._first_s is not None else clock_s)
        counts = [count for time_s, count in self._in_system if time_s >= first_s]
        growth = counts[-1] - counts[0] if counts else 0
        completed = sum(1 for _ in self.within(clock_s, clock_s - first_s))
        return max(completed + growth, 0), clock_s - first_s

    def failures(self, clock_s: float, window_s: float) -> tuple[Counter[str], Counter[str]]:
        """By replica: how many requests it failed, and how many it was sent."""
        failed: Counter[str] = Counter()
        sent: Counter[str] = Counter()
        for sample in self.within(clock_s, window_s):
            failing = {replica for replica, _ in sample.failures}
            failed.update(failing)
            sent.update({*failing, *([sample.replica] if sample.replica else [])})
        return failed, sent

    def figures(self, clock_s: float, window_s: float) -> dict[str, float]:
        """Means and medians over the successful requests. Figures without data are left out."""
        answered = [sample for sample in self.within(clock_s, window_s) if sample.outcome is Outcome.OK]
        prompts = sum(sample.prompt_tokens for sample in answered)
        ttfts = [sample.ttft_s for sample in answered if sample.ttft_s is not None]
        tpots = [sample.tpot_s for sample in answered if sample.tpot_s is not None]
        found = {
            "prompt_tokens": prompts / len(answered) if answered else math.nan,
            "output_tokens": fmean(sample.output_tokens for sample in answered) if answered else math.nan,
            "cached_share": sum(sample.cached_tokens for sample in answered) / prompts if prompts else math.nan,
            "queue_s": fmean(sample.queue_s for sample in answered) if answered else math.nan,
            "ttft_s": median(ttfts) if ttfts else math.nan,
            "tpot_s": median(tpots) if tpots else math.nan,
            "answered": float(len(answered)),
        }
        return {name: value for name, value in found.items() if not math.isnan(value)}
