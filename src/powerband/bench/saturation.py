"""Is a server behind for good? Its queue grows, and so do times to first token: more time only makes it worse."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

from powerband.metrics.figures import Window
from powerband.metrics.record import Outcome, RequestRecord
from powerband.metrics.statistics import slope_per_s

_MIN_REQUESTS = 20  # requests to judge by
_LOOKS = 50  # at how many moments the requests in flight are counted
_SURE = 4.0  # standard errors
_GROWTH = 0.5  # over the window, as a share of the mean: what is steeper is no noise of arrivals


@dataclass(frozen=True, slots=True)
class Trend:
    """Growth over a window as a share of the mean, and how many standard errors it is from none."""

    growth: float
    certainty: float

    @property
    def rises(self) -> bool:
        return self.growth > _GROWTH and self.certainty > _SURE


def is_saturated(records: Sequence[RequestRecord], window: Window) -> bool:
    """Both the requests in flight and the times to first token rise through the window."""
    first_tokens = [(r.scheduled_s, r.ttft_s) for r in records if r.scheduled_s in window and r.ttft_s is not None]
    if len(first_tokens) < _MIN_REQUESTS:
        return False
    times, ttfts = [time for time, _ in first_tokens], [ttft for _, ttft in first_tokens]
    return in_flight_trend(records, window).rises and _trend(times, ttfts, window).rises


def in_flight_trend(records: Sequence[RequestRecord], window: Window) -> Trend:
    """Requests that were scheduled and not yet over, at equally spaced moments."""
    starts = sorted(record.scheduled_s for record in records)
    ends = sorted(_end_s(record) for record in records)
    times = [window.start_s + window.seconds * (i + 0.5) / _LOOKS for i in range(_LOOKS)]
    counts = [float(bisect.bisect_right(starts, t) - bisect.bisect_right(ends, t)) for t in times]
    return _trend(times, counts, window)


def _end_s(record: RequestRecord) -> float:
    if record.outcome in (Outcome.TIMED_OUT, Outcome.ABORTED):  # in flight to the end
        return math.inf
    return record.chunk_times_s[-1] if record.chunk_times_s else record.sent_s


def _trend(times_s: Sequence[float], values: Sequence[float], window: Window) -> Trend:
    mean = sum(values) / len(values)
    if mean <= 0:
        return Trend(0.0, 0.0)
    slope, certainty = slope_per_s(times_s, values)
    return Trend(slope * window.seconds / mean, certainty)
