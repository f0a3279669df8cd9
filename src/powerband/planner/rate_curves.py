"""How deployments of one kind of replica do at other rates and in other numbers: the closed form as plain numbers.

    ClosedForm.at(rate / count) at some shares of its capacity, as predicted and at both edges of the band ──► RateCurve

Between the points it is read on straight lines, here and in the page of a plan, which has nothing else to answer with:
what both say of a rate is the same.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

from powerband.spec.plan import Prediction
from powerband.spec.slo import SLO

# Of the capacity. Close together where times change fast: at the beginning, and towards the end.
_POINTS = (
    *(0.002, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.83, 0.86, 0.88),
    *(0.9, 0.92, 0.935, 0.945, 0.955, 0.965, 0.972, 0.979, 0.984, 0.988, 0.992, 0.995),
)
# Times the share of requests beyond the percentile: from that load on, some of the others wait, too.
_TAIL = (1.0, 1.03, 1.08, 1.15, 1.25, 1.4, 1.6, 1.8)
MAX_CAPACITY_RATIO = 1.5  # of the fast edge to what is predicted
_ROUNDS = 40  # of bisection


def curve_points(attainment: float) -> tuple[float, ...]:
    """Shares of a capacity at which curves for this percentile are computed."""
    tail = (factor * (1 - attainment) for factor in _TAIL)
    return tuple(sorted({*_POINTS, *(point for point in tail if 0 < point < _POINTS[-1])}))


class DeploymentPrice(TypedDict):
    """Dollars an hour of the cheapest machines, and how many of each; None: not all have a known price."""

    usd_per_hour: float | None
    machines: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class SpeedCurve:
    """Seconds of one replica at some loads, at one edge of the band. points: the loads, as shares of its capacity
    (requests a second).
    """

    points: tuple[float, ...]
    capacity: float
    ttft_s: tuple[float, ...]  # at the SLO's percentile
    tpot_s: tuple[float, ...]
    e2e_mean_s: tuple[float, ...]

    def at(self, rate: float, name: str) -> float:
        """Of 'ttft_s', 'tpot_s' or 'e2e_mean_s' at so many requests a second and replica; infinity: it never ends."""
        share, points, values = rate / self.capacity, self.points, getattr(self, name)
        if share > points[-1]:
            return math.inf
        place = bisect_right(points, share)
        if place == 0:
            return float(values[0])
        if place == len(points):
            return float(values[-1])
        low, high = points[place - 1], points[place]
        return float(values[place - 1] + (share - low) / (high - low) * (values[place] - values[place - 1]))


@dataclass(frozen=True, slots=True)
class RateCurve:
    """One kind of replica. prices: of 1, 2, … of them, as many as there may be; empty: their number is fixed."""

    predicted: SpeedCurve
    slow: SpeedCurve
    fast: SpeedCurve
    output: float  # mean tokens of an answer
    output_of_arrival: float  # ... and of all answers of a conversation
    prices: tuple[DeploymentPrice, ...]

    def capacity(self, slo: SLO, count: int, factors: Mapping[str, float]) -> Prediction:
        """Up to which rate so many of them keep an SLO. factors: on the figures, see `correction`."""
        value, low, high = (
            _kept_rate(speed, slo, self.output, factors) * count for speed in (self.predicted, self.slow, self.fast)
        )
        return Prediction(value, low, max(value, min(high, value * MAX_CAPACITY_RATIO)))


def _kept_rate(speed: SpeedCurve, slo: SLO, output: float, factors: Mapping[str, float]) -> float:
    """Of one replica; 0: none."""
    low, high = 0.0, speed.capacity
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        if _keeps(speed, middle, slo, output, factors):
            low = middle
        else:
            high = middle
    return low if low > speed.capacity * 1e-4 else 0.0


def _keeps(speed: SpeedCurve, rate: float, slo: SLO, output: float, factors: Mapping[str, float]) -> bool:
    ttft_s = speed.at(rate, "ttft_s") * factors.get("ttft_s", 1.0)
    tpot_s = speed.at(rate, "tpot_s") * factors.get("tpot_s", 1.0)
    pairs = ((ttft_s, slo.ttft_s), (tpot_s, slo.tpot_s), (ttft_s + (output - 1) * tpot_s, slo.e2e_s))
    return math.isfinite(ttft_s) and all(limit is None or value <= limit for value, limit in pairs)
