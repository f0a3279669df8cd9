"""Fits of coefficients to measurements, by scipy.optimize, in which few outliers count little.

fitted = fit(model, {"compute_share": (0.05, 1.0), "overhead_s": (1e-7, 1e-4)}, predict, points, seconds)

scipy is needed to calibrate and for nothing else; it is imported by the first fit (pip install 'powerband[serve]').
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Generic, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from powerband.extras import require

Model = TypeVar("Model")
Point = TypeVar("Point")
Vector = NDArray[np.float64]
Bounds = Mapping[str, tuple[float, float]]

_SOFT_ERROR = 0.1  # of a log-ratio: smaller errors count squared, larger ones linearly
_EDGE = 1e-4  # a start on a bound is moved inside by this fraction of the range
_REWEIGHTINGS = 8


def scipy_optimize() -> ModuleType:
    """Raises MissingPackage where scipy is not installed."""
    require("scipy", "Calibration")
    import scipy.optimize

    return cast(ModuleType, scipy.optimize)


@dataclass(frozen=True, slots=True)
class FitErrors:
    """|predicted − measured| / measured over `n` measurements, as fractions."""

    n: int
    median: float
    mean: float
    p90: float
    bias: float  # the mean with its sign

    @classmethod
    def from_values(cls, predicted: Sequence[float] | Vector, measured: Sequence[float] | Vector) -> FitErrors:
        """Needs one measurement at least, all above 0."""
        signed = np.asarray(predicted, float) / np.asarray(measured, float) - 1
        size = np.abs(signed)
        return cls(
            len(size),
            float(np.median(size)),
            float(size.mean()),
            float(np.quantile(size, 0.9)),
            float(signed.mean()),
        )


@dataclass(frozen=True, slots=True)
class FitResult(Generic[Model]):
    model: Model
    errors: FitErrors  # on the points of the fit


def fit(
    model: Model,
    bounds: Bounds,
    predict: Callable[[Model, Point], float],
    points: Sequence[Point],
    seconds: Sequence[float],
) -> FitResult[Model]:
    """The coefficients named in `bounds` (0 < low < high) that fit best, starting from those of `model`.

    model: a dataclass. seconds: measured, above 0, one for each of `points`.
    """
    names, measured = list(bounds), np.log(np.asarray(seconds, float))
    low, high = np.log(np.array([bounds[name] for name in names], float)).T
    start = np.log([max(getattr(model, name), bounds[name][0]) for name in names])
    margin = _EDGE * (high - low)

    def built(logs: Vector) -> Model:
        changes = {name: float(value) for name, value in zip(names, np.exp(logs), strict=True)}
        return cast(Model, replace(cast(Any, model), **changes))

    def residuals(logs: Vector) -> Vector:
        candidate = built(logs)
        found: Vector = np.log(np.array([predict(candidate, point) for point in points])) - measured
        return found

    solution = scipy_optimize().least_squares(
        residuals,
        np.clip(start, low + margin, high - margin),
        bounds=(low, high),
        loss="soft_l1",
        f_scale=_SOFT_ERROR,
        diff_step=1e-4,
        max_nfev=60,
    )
    best = built(solution.x)
    return FitResult(best, FitErrors.from_values([predict(best, point) for point in points], np.exp(measured)))


def non_negative(matrix: Vector, target: Vector, *, scale: float) -> Vector:
    """x ≥ 0 with the least |matrix · x − target|, where what is further off than `scale` counts less (soft L1)."""
    nnls = scipy_optimize().nnls
    size = np.linalg.norm(matrix, axis=0)
    size[size == 0] = 1.0
    weights, found = np.ones(len(target)), np.zeros(matrix.shape[1])
    for _ in range(_REWEIGHTINGS):
        root = np.sqrt(weights)
        found = nnls(matrix / size * root[:, None], target * root)[0] / size
        weights = 1 / np.sqrt(1 + ((matrix @ found - target) / scale) ** 2)
    return found


def spread(features: Sequence[Sequence[float]], count: int) -> list[int]:
    """Indices of `count` points that lie far from each other: what to measure when only so much can be.

    Each next one is the farthest from those chosen (Gonzalez 1985), after features are scaled to their range.
    """
    table = np.asarray(features, float)
    table = (table - table.min(axis=0)) / np.maximum(np.ptp(table, axis=0), 1e-12)
    chosen = [int(np.argmin(table.sum(axis=1)))]
    distance = np.full(len(table), np.inf)
    while len(chosen) < min(count, len(table)):
        distance = np.minimum(distance, ((table - table[chosen[-1]]) ** 2).sum(axis=1))
        chosen.append(int(np.argmax(distance)))
    return chosen
