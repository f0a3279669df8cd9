"""What the last minute of traffic looked like: arrivals, failures, caches, lengths, latencies. Times on one clock."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import fmean, median

from powerband.gateway.promise import saw_first_token
from powerband.gateway.request import Finished
from powerband.gateway.snapshot import PoolSnapshot
from powerband.metrics.record import Outcome

KEPT_S = 60.0
_FAILED = (Outcome.ERROR, Outcome.TIMED_OUT)


@dataclass(frozen=True, slots=True)
class RequestSample:
    """What is kept of a request. failed: replicas that failed it, with codes; others may have answered it after all."""

    time_s: float
    outcome: Outcome
    status: int
    error: str
    replica: str
    failed: tuple[tuple[str, str], ...]
    alone: bool  # one replica answered it from start to end
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    queue_s: float
    ttft_s: float | None
    tpot_s: float | None

    @classmethod
    def of(cls, finished: Finished, time_s: float) -> RequestSample:
        record, tried = finished.record, finished.replicas
        is_seen = saw_first_token(finished)
        failed = finished.failed
        if record.outcome in _FAILED and tried and tried[-1] not in dict(failed):
            failed = (*failed, (tried[-1], finished.error or record.outcome.value))
        return cls(
            time_s,
            record.outcome,
            finished.status,
            finished.error,
            tried[-1] if tried else "",
            failed,
            len(tried) == 1,
            record.prompt_tokens,
            record.cached_tokens,
            record.output_tokens,
            finished.queue_s,
            record.ttft_s if is_seen else None,
            record.tpot_s if is_seen else None,
        )


@dataclass(slots=True)
class RecentTraffic:
    _seen: deque[RequestSample] = field(default_factory=deque)
    _outstanding: deque[tuple[float, int]] = field(default_factory=deque)  # requests that are not over, by time
    _since_s: float | None = None

    def add(self, seen: Iterable[RequestSample], pools: Iterable[PoolSnapshot], clock_s: float) -> None:
        if self._since_s is None:
            self._since_s = clock_s
        self._seen.extend(seen)
        inside = sum(pool.queued + sum(replica.inflight for replica in pool.replicas) for pool in pools)
        self._outstanding.append((clock_s, inside))
        while self._seen and self._seen[0].time_s < clock_s - KEPT_S:
            self._seen.popleft()
        while self._outstanding[0][0] < clock_s - KEPT_S:
            self._outstanding.popleft()

    def within(self, clock_s: float, window_s: float) -> Iterator[RequestSample]:
        """Requests that ended in the last seconds, the latest first."""
        for seen in reversed(self._seen):
            if seen.time_s < clock_s - window_s:
                return
            yield seen

    def arrivals(self, clock_s: float, window_s: float) -> tuple[int, float]:
        """Requests that came in the last seconds, and how many these are: fewer after the start. Those that ended, and
        by how many those that have not became more.
        """
        first_s = max(clock_s - window_s, self._since_s if self._since_s is not None else clock_s)
        inside = [count for time_s, count in self._outstanding if time_s >= first_s]
        growth = inside[-1] - inside[0] if inside else 0
        ended = sum(1 for _ in self.within(clock_s, clock_s - first_s))
        return max(ended + growth, 0), clock_s - first_s

    def failures(self, clock_s: float, window_s: float) -> tuple[Counter[str], Counter[str]]:
        """By replica: requests that it failed, and requests that it had."""
        failed: Counter[str] = Counter()
        had: Counter[str] = Counter()
        for seen in self.within(clock_s, window_s):
            broken = {replica for replica, _ in seen.failed}
            failed.update(broken)
            had.update({*broken, *([seen.replica] if seen.replica else [])})
        return failed, had

    def figures(self, clock_s: float, window_s: float) -> dict[str, float]:
        """Means and medians of answered requests; what none tells is not there."""
        answered = [seen for seen in self.within(clock_s, window_s) if seen.outcome is Outcome.OK]
        prompts = sum(seen.prompt_tokens for seen in answered)
        ttfts = [seen.ttft_s for seen in answered if seen.ttft_s is not None]
        tpots = [seen.tpot_s for seen in answered if seen.tpot_s is not None]
        told = {
            "prompt_tokens": prompts / len(answered) if answered else math.nan,
            "output_tokens": fmean(seen.output_tokens for seen in answered) if answered else math.nan,
            "cached_share": sum(seen.cached_tokens for seen in answered) / prompts if prompts else math.nan,
            "queue_s": fmean(seen.queue_s for seen in answered) if answered else math.nan,
            "ttft_s": median(ttfts) if ttfts else math.nan,
            "tpot_s": median(tpots) if tpots else math.nan,
            "answered": float(len(answered)),
        }
        return {name: value for name, value in told.items() if not math.isnan(value)}
