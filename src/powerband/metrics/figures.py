"""From the records of a run, or of a stretch of live traffic, to the figures that are compared and promised."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from powerband.metrics.record import Outcome, RequestRecord
from powerband.metrics.slo import slo_misses
from powerband.metrics.statistics import (
    MIN_FOR_INTERVAL,
    Interval,
    min_samples,
    percentile_interval,
    wilson,
)
from powerband.spec.quantities import count_text
from powerband.spec.slo import SLO

PERCENTILES = (50.0, 90.0, 95.0, 99.0)
# A run whose client was later than this says nothing about the server (definitions.py, "send lag").
MAX_LAG_S, MAX_LAG_RATIO = 0.005, 0.01  # the larger: seconds, and a share of the median TTFT
MAX_LATE_RATIO, MIN_LATE = 0.01, 3  # of requests that are later


@dataclass(frozen=True, slots=True)
class Window:
    """The stretch that counts, on the records' clock: requests scheduled in it, tokens that arrived in it. Both ends
    belong to it: it ends with an arrival.
    """

    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    def __contains__(self, time_s: float) -> bool:
        return self.start_s <= time_s <= self.end_s


@dataclass(frozen=True, slots=True)
class Distribution:
    """One figure over many requests. A percentile is None where too few samples lie beyond it (see
    statistics.fewest_samples). intervals: at 95 % confidence; None, too, where samples depend on each other.
    """

    count: int
    mean: float
    minimum: float
    maximum: float
    percentiles: dict[float, float | None]
    intervals: dict[float, Interval | None]

    @classmethod
    def of(cls, samples: Iterable[float]) -> Distribution | None:
        """Of samples that do not depend on each other. None for no samples."""
        ordered = sorted(samples)
        if not ordered:
            return None
        shown = {q: len(ordered) >= min_samples(q) for q in PERCENTILES}
        return cls(
            len(ordered),
            math.fsum(ordered) / len(ordered),
            ordered[0],
            ordered[-1],
            {q: _between(ordered, (len(ordered) - 1) * q / 100) if shown[q] else None for q in PERCENTILES},
            {
                q: percentile_interval(ordered, q) if shown[q] and len(ordered) >= MIN_FOR_INTERVAL else None
                for q in PERCENTILES
            },
        )

    @classmethod
    def of_itl(cls, records: Sequence[RequestRecord]) -> Distribution | None:
        """Of record.pooled_itl_s: a gap before k tokens is k samples of gap / k. They are counted, not written out:
        what a server says of its tokens must not cost memory.
        """
        import numpy as np  # a tenth of a second, for those who need it

        times = np.fromiter(chain.from_iterable(r.chunk_times_s for r in records), np.float64)
        tokens = np.fromiter(chain.from_iterable(r.chunk_tokens for r in records), np.float64)
        is_first = np.zeros(len(times), bool)
        lengths = np.array([len(r.chunk_times_s) for r in records if r.chunk_times_s], np.int64)
        is_first[np.cumsum(lengths) - lengths] = True
        gaps, weights = np.diff(times, prepend=0.0)[~is_first], tokens[~is_first]
        if not len(gaps):
            return None
        values = gaps / weights
        order = np.argsort(values)
        values, reached = values[order], np.cumsum(weights[order])
        count = int(reached[-1])

        def at(rank: int) -> float:
            place = int(np.searchsorted(reached, float(rank), side="right"))
            return float(values[min(place, len(values) - 1)])  # where counts are beyond what a float holds exactly

        percentiles: dict[float, float | None] = {}
        for q in PERCENTILES:
            low, part = divmod((count - 1) * q / 100, 1)
            pair = at(int(low)), at(min(int(low) + 1, count - 1))
            percentiles[q] = _between(pair, part) if count >= min_samples(q) else None
        none: dict[float, Interval | None] = dict.fromkeys(PERCENTILES)
        return cls(count, float(gaps.sum() / count), float(values[0]), float(values[-1]), percentiles, none)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """misses: scheduled requests that did not meet the SLO, by reason: a figure's name or an outcome's. A request that
    missed several figures counts in each. Rates are per second of the window; 0 where it has no length.
    """

    window: Window
    scheduled: int
    outcomes: dict[str, int]
    request_rate: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    cached_share: float  # of the prompt tokens of successful requests
    slo: SLO | None
    good: int
    attainment: float | None
    attainment_interval: Interval | None
    goodput: float | None  # requests
    misses: dict[str, int]
    figures: dict[str, Distribution]  # ttft, service_ttft, tpot, itl, stall, e2e, send_lag
    late: int  # requests that were sent later than max_lag_s
    max_lag_s: float
    valid_share: float | None = None  # of the answers whose form was checked; None: none was
    undecided: int = 0  # aborted by the client before any limit had passed: neither kept nor missed the SLO

    @property
    def judged(self) -> int:
        """Requests that attainment is a share of."""
        return self.scheduled - self.undecided

    @property
    def client_fault(self) -> str:
        """Why the run says nothing about the server, or ''. More than one request in a hundred was late, that is, their
        99th percentile was; of fewer than 300 requests, at least three, since a single one proves nothing. Or they were
        late on average.
        """
        lag = self.figures.get("send_lag")
        if lag is None:
            return ""
        are_many = self.late >= MIN_LATE and self.late > MAX_LATE_RATIO * lag.count
        if not are_many and lag.mean <= self.max_lag_s:
            return ""
        limit, worst = self.max_lag_s * 1000, lag.maximum * 1000
        late = f"{self.late} of {count_text(lag.count, 'request')}"
        return f"the client sent {late} more than {limit:.1f} ms late, up to {worst:.1f} ms"


def summarize(records: Sequence[RequestRecord], window: Window, slo: SLO | None = None) -> Summary:
    """Figures of the requests scheduled in `window`. Every scheduled request needs a record, whatever became of it."""
    counted = [record for record in records if record.scheduled_s in window]
    answered = [record for record in counted if record.outcome is Outcome.OK]
    all_verdicts = [slo_misses(record, slo) for record in counted] if slo is not None else []
    verdicts = [verdict for verdict in all_verdicts if verdict is not None]
    good = sum(not verdict for verdict in verdicts)
    seconds = window.seconds if window.seconds > 0 else math.inf
    prompt_tokens = sum(record.prompt_tokens for record in answered)
    cached = sum(record.cached_tokens for record in answered)
    figures = _figures(counted, answered)
    checked = [record.is_valid for record in answered if record.is_valid is not None]
    median_s = figures["ttft"].percentiles[50.0] if "ttft" in figures else None
    max_lag_s = max(MAX_LAG_S, MAX_LAG_RATIO * (median_s or 0.0))
    return Summary(
        window=window,
        scheduled=len(counted),
        outcomes=dict(Counter(record.outcome.value for record in counted)),
        request_rate=len(counted) / seconds,
        prompt_tokens_per_s=sum(r.prompt_tokens for r in records if r.chunk_times_s and r.chunk_times_s[0] in window)
        / seconds,
        output_tokens_per_s=sum(_tokens_within(record, window) for record in records) / seconds,
        cached_share=cached / prompt_tokens if prompt_tokens else 0.0,
        slo=slo,
        good=good,
        attainment=good / len(verdicts) if verdicts else None,
        attainment_interval=wilson(good, len(verdicts)) if slo is not None else None,
        goodput=good / seconds if slo is not None else None,
        misses=dict(Counter(reason for verdict in verdicts for reason in verdict)),
        figures=figures,
        late=sum(record.send_lag_s > max_lag_s for record in _sent(counted)),
        max_lag_s=max_lag_s,
        valid_share=sum(checked) / len(checked) if checked else None,
        undecided=len(all_verdicts) - len(verdicts),
    )


def _between(ordered: Sequence[float], position: float) -> float:
    """The value at a place in sorted samples, linear between neighbours."""
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def _figures(counted: list[RequestRecord], answered: list[RequestRecord]) -> dict[str, Distribution]:
    """Latencies of requests that succeeded; the client's lag of all but those that it gave up itself."""
    made = {
        name: Distribution.of(value for r in answered if (value := getattr(r, f"{name}_s")) is not None)
        for name in ("ttft", "service_ttft", "tpot", "stall", "e2e")
    }
    made["itl"] = Distribution.of_itl(answered)
    made["send_lag"] = Distribution.of(record.send_lag_s for record in _sent(counted))
    return {name: distribution for name, distribution in made.items() if distribution is not None}


def _sent(counted: list[RequestRecord]) -> list[RequestRecord]:
    """Those whose lag counts: all but what the client gave up itself."""
    return [record for record in counted if record.outcome is not Outcome.ABORTED]


def _tokens_within(record: RequestRecord, window: Window) -> int:
    times_s = record.chunk_times_s
    return sum(record.chunk_tokens[bisect_left(times_s, window.start_s) : bisect_right(times_s, window.end_s)])
