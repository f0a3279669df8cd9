"""What a sample says about what it was taken from: intervals of shares, of percentiles and of differences."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Samples: TypeAlias = "npt.NDArray[np.float64]"

CONFIDENCE = 0.95
MIN_FOR_INTERVAL = 6  # with five, the median lies outside of all of them once in sixteen times
_BOOTSTRAP_SAMPLES = 1000

Interval = tuple[float, float]


def z_of(confidence: float) -> float:
    """How many standard deviations a two-sided interval reaches: 0.95 → 1.96."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson(successes: int, trials: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of a share (Wilson 1927); (0, 1) for no trials."""
    if trials == 0:
        return 0.0, 1.0
    z2, share = z_of(confidence) ** 2, successes / trials
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    reach = math.sqrt(z2 * (share * (1 - share) / trials + z2 / (4 * trials**2))) / (1 + z2 / trials)
    # With none or all successes an edge is 0 or 1 exactly, which rounding misses.
    return max(middle - reach, 0.0) if successes else 0.0, min(middle + reach, 1.0) if successes < trials else 1.0


def percentile_interval(ordered: Sequence[float], q: float, confidence: float = CONFIDENCE) -> Interval:
    """Between two of the sorted samples, whose ranks are the binomial's (normal approximation; Conover 1999, 3.2), one
    rank wider above. So it holds its 95 % (94.5 at worst) wherever `min_samples` allows a percentile, the
    median's from FEWEST_FOR_INTERVAL on.
    """
    n, p = len(ordered), q / 100
    reach = z_of(confidence) * math.sqrt(n * p * (1 - p))
    low, high = math.floor(n * p - reach), math.ceil(n * p + reach)
    return ordered[min(max(low, 0), n - 1)], ordered[min(max(high, 0), n - 1)]


def min_samples(q: float) -> int:
    """The q-th percentile needs this many samples: five must lie beyond it (500 for the 99th)."""
    return 1 if q <= 50 else math.ceil(5 / (1 - q / 100) - 1e-9)


def bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    difference: Callable[[Samples, Samples], float],
    *,
    paired: bool,
    block: int = 1,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Percentile-bootstrap interval of a difference of two samples (Efron 1979). paired: drawn together, by index.

    block: so many neighbours are drawn together, round the end (circular block bootstrap, Politis and Romano 1992), for
    samples in an order in which neighbours are alike. difference: of two numpy arrays.

    (NaN, NaN) where either has no members. Raises ValueError for pairs that are none.
    """
    if paired and len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} samples are no pairs")
    if not len(first) or not len(second):
        return math.nan, math.nan
    import numpy as np  # a tenth of a second, for those who need it

    generator = np.random.default_rng(seed)
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)

    def drawn(size: int) -> npt.NDArray[np.intp]:
        length = min(block, size)
        starts = generator.integers(size, size=-(-size // length))
        return ((starts[:, None] + np.arange(length)) % size).reshape(-1)[:size]

    found = []
    for _ in range(_BOOTSTRAP_SAMPLES):
        chosen = drawn(len(a))
        found.append(float(difference(a[chosen], b[chosen if paired else drawn(len(b))])))
    found.sort()
    edge = (1 - confidence) / 2
    return found[int(edge * len(found))], found[min(int((1 - edge) * len(found)), len(found) - 1)]


def cliffs_delta(first: Sequence[float], second: Sequence[float]) -> float:
    """P(second > first) − P(second < first), of random members: −1 to 1, 0 for no effect (Cliff 1993)."""
    if not first or not second:
        return math.nan
    ordered = sorted(first)
    total = 0
    for value in second:
        total += bisect_left(ordered, value) - (len(ordered) - bisect_right(ordered, value))
    return total / (len(first) * len(second))


def slope_per_s(times_s: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope of values over time, and how many of its standard errors it is away from 0."""
    n = len(times_s)
    if n < 3:
        return 0.0, 0.0
    middle_t, middle_v = sum(times_s) / n, sum(values) / n
    spread = sum((t - middle_t) ** 2 for t in times_s)
    if spread == 0:
        return 0.0, 0.0
    slope = sum((t - middle_t) * (v - middle_v) for t, v in zip(times_s, values, strict=True)) / spread
    left = sum((v - middle_v - slope * (t - middle_t)) ** 2 for t, v in zip(times_s, values, strict=True))
    error = math.sqrt(left / (n - 2) / spread)
    if error == 0:
        return slope, math.copysign(math.inf, slope) if slope else 0.0
    return slope, slope / error
