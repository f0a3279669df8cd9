"""SLO attainment over sliding windows, and how fast misses burn the error budget.

An SLO of 95 % lets 5 % of requests miss: the error budget. A burn rate of 1 uses it up exactly, 4 four times as fast.
An alert needs a high burn rate over a long window (it matters) and over a short one (it is still so), and more misses
than chance explains. The windows are shorter than those for monthly budgets (Google's SRE workbook: 14.4 over an hour
and 5 minutes), for two reasons: a budget of 5 % can burn at 20 at most, and a service that was started ten minutes ago
should be monitored, too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from powerband.metrics.statistics import wilson
from powerband.spec.slo import SLO

WINDOWS_S = (60, 300, 3600)
_MAX_AGE_S = 2 * 3600
_CONFIDENCE = 0.999
_CURRENT_S = 60
_MIN_ERROR_BUDGET = 0.001  # with an SLO of 100 %, a single miss would raise an alert
_MAX_MISS_RATIO = 0.9  # upper limit of an alert's threshold; with an SLO of 50 %, this is a burn rate of 1.8


@dataclass(frozen=True, slots=True)
class BurnRateWindows:
    """An alert when the budget burns at least this fast over both windows, in seconds."""

    name: str
    long_s: int
    short_s: int
    burn_rate: float


BURN_RATE_WINDOWS = (
    BurnRateWindows("fast", 60, 10, 4.0),
    BurnRateWindows("medium", 300, 60, 2.0),
    BurnRateWindows("slow", 3600, 300, 1.2),
)


@dataclass(frozen=True, slots=True)
class WindowCounts:
    """The requests in a window that count towards the SLO, and how many of them met it."""

    good: int
    total: int

    @property
    def attainment(self) -> float | None:
        return self.good / self.total if self.total else None


@dataclass(slots=True)
class SLOBurn:
    """Cumulative counts by second. Times on a monotonic clock; a request counts in the second it is reported."""

    slo: SLO
    _seconds: list[int] = field(default_factory=list)
    _good: list[int] = field(default_factory=list)
    _total: list[int] = field(default_factory=list)
    _misses: list[Counter[str]] = field(default_factory=list)  # of that second alone

    def add(self, time_s: float, misses: list[str]) -> None:
        """Count a completed request, with the objectives that it missed."""
        second = int(time_s)
        if not self._seconds or second > self._seconds[-1]:
            self._seconds.append(second)
            self._good.append(self._good[-1] if self._good else 0)
            self._total.append(self._total[-1] if self._total else 0)
            self._misses.append(Counter())
            self._drop_old(second)
        self._total[-1] += 1
        self._good[-1] += not misses
        self._misses[-1].update(misses)

    def window(self, now_s: float, window_s: float) -> WindowCounts:
        """The requests of the last `window_s` seconds."""
        if not self._seconds:
            return WindowCounts(0, 0)
        first = bisect_left(self._seconds, now_s - window_s)
        if first == len(self._seconds):
            return WindowCounts(0, 0)
        good, total = (self._good[first - 1], self._total[first - 1]) if first else (0, 0)
        return WindowCounts(self._good[-1] - good, self._total[-1] - total)

    def misses(self, now_s: float, window_s: float) -> dict[str, int]:
        """Requests by the objective that they missed, the most frequent first."""
        first = bisect_left(self._seconds, now_s - window_s)
        return dict(sum(self._misses[first:], Counter()).most_common())

    def burn_rate(self, now_s: float, window_s: float) -> float | None:
        """None: there were no requests."""
        attained = self.window(now_s, window_s).attainment
        return None if attained is None else (1 - attained) / self.error_budget

    @property
    def error_budget(self) -> float:
        """The fraction of requests that may miss the SLO."""
        return max(1 - self.slo.attainment, _MIN_ERROR_BUDGET)

    def alert(self, now_s: float) -> BurnRateWindows | None:
        """The first pair of windows in both of which the budget burns too fast; None: there is none."""
        for pair in BURN_RATE_WINDOWS:
            long, short = self.window(now_s, pair.long_s), self.window(now_s, pair.short_s)
            max_attainment = 1 - min(pair.burn_rate * self.error_budget, _MAX_MISS_RATIO)
            if any(counts.attainment is None or counts.attainment > max_attainment for counts in (long, short)):
                continue
            if (self.burn_rate(now_s, min(pair.short_s, _CURRENT_S)) or 0.0) < 1:  # it is over
                continue
            if wilson(long.good, long.total, _CONFIDENCE)[1] < 1 - self.error_budget:
                return pair
        return None

    def _drop_old(self, now: int) -> None:
        if now - self._seconds[0] > 2 * _MAX_AGE_S:
            first = bisect_left(self._seconds, now - _MAX_AGE_S)
            first = max(first - 1, 0)  # keep one more: later counts are relative to it
            for column in (self._seconds, self._good, self._total, self._misses):
                del column[:first]
