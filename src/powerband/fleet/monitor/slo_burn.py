"""How well the promise was kept over sliding windows, and how fast that burns the budget of misses.

A promise of 95 % lets 5 % of requests miss. Burning at 1 uses that up exactly; at 4, four times as fast. An alert wants
a fast burn over a long window (it matters) and over a short one (it is still so), and more misses than chance explains.
The pairs are shorter than those for monthly budgets (Google's 14.4 over an hour and 5 minutes), for two reasons: a
budget of 5 % can burn at 20 at most, and a service that was started ten minutes ago should be watched, too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from powerband.metrics.statistics import wilson
from powerband.spec.slo import SLO

WINDOWS_S = (60, 300, 3600)
_KEPT_S = 2 * 3600
_CONFIDENCE = 0.999
_NOW_S = 60
_MIN_ERROR_BUDGET = 0.001  # a promise of all requests has a budget, too, or one miss would be an alert


@dataclass(frozen=True, slots=True)
class BurnRateWindows:
    """An alert when the budget burns at least so fast over both windows, in seconds."""

    name: str
    long_s: int
    short_s: int
    burn: float


BURN_RATE_WINDOWS = (
    BurnRateWindows("fast", 60, 10, 4.0),
    BurnRateWindows("medium", 300, 60, 2.0),
    BurnRateWindows("slow", 3600, 300, 1.2),
)


@dataclass(frozen=True, slots=True)
class AttainmentRatio:
    """Requests of a window that count, and those that kept the SLO."""

    good: int
    total: int

    @property
    def attainment(self) -> float | None:
        return self.good / self.total if self.total else None


@dataclass(slots=True)
class SLOBurn:
    """Counts by second, cumulative. Times on a monotonic clock; what is told late counts where it is told."""

    slo: SLO
    _seconds: list[int] = field(default_factory=list)
    _good: list[int] = field(default_factory=list)
    _total: list[int] = field(default_factory=list)
    _misses: list[Counter[str]] = field(default_factory=list)  # of that second

    def add(self, time_s: float, misses: list[str]) -> None:
        """A request that is over; `misses`: as `verdict` says."""
        second = int(time_s)
        if not self._seconds or second > self._seconds[-1]:
            self._seconds.append(second)
            self._good.append(self._good[-1] if self._good else 0)
            self._total.append(self._total[-1] if self._total else 0)
            self._misses.append(Counter())
            self._forget(second)
        self._total[-1] += 1
        self._good[-1] += not misses
        self._misses[-1].update(misses)

    def over(self, now_s: float, window_s: float) -> AttainmentRatio:
        """Of what ended in the last `window_s` seconds."""
        if not self._seconds:
            return AttainmentRatio(0, 0)
        first = bisect_left(self._seconds, now_s - window_s)
        if first == len(self._seconds):
            return AttainmentRatio(0, 0)
        before_good, before_total = (self._good[first - 1], self._total[first - 1]) if first else (0, 0)
        return AttainmentRatio(self._good[-1] - before_good, self._total[-1] - before_total)

    def misses(self, now_s: float, window_s: float) -> dict[str, int]:
        """Why requests missed the SLO, the most frequent reason first."""
        first = bisect_left(self._seconds, now_s - window_s)
        return dict(sum(self._misses[first:], Counter()).most_common())

    def burn(self, now_s: float, window_s: float) -> float | None:
        """How fast the budget of misses is used up; 1: just so that the promise is kept. None: no requests."""
        attained = self.over(now_s, window_s).attainment
        return None if attained is None else (1 - attained) / self.budget

    @property
    def budget(self) -> float:
        """The share of requests that may miss."""
        return max(1 - self.slo.attainment, _MIN_ERROR_BUDGET)

    def alert(self, now_s: float) -> BurnRateWindows | None:
        """The first pair of windows over both of which the budget burns too fast."""
        for pair in BURN_RATE_WINDOWS:
            long, short = self.over(now_s, pair.long_s), self.over(now_s, pair.short_s)
            most = 1 - min(pair.burn * self.budget, 0.9)  # attainment; of a promise of half the requests, a burn of 1.8
            if any(share.attainment is None or share.attainment > most for share in (long, short)):
                continue
            if (self.burn(now_s, min(pair.short_s, _NOW_S)) or 0.0) < 1:  # it is over
                continue
            if wilson(long.good, long.total, _CONFIDENCE)[1] < 1 - self.budget:
                return pair
        return None

    def _forget(self, now: int) -> None:
        if now - self._seconds[0] > 2 * _KEPT_S:
            first = bisect_left(self._seconds, now - _KEPT_S)
            # The last one that is forgotten stays: what follows is counted from it.
            first = max(first - 1, 0)
            for kept in (self._seconds, self._good, self._total, self._misses):
                del kept[:first]
