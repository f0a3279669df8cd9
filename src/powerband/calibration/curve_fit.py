"""Coefficients of laws from measurements: least squares on log(predicted / measured), few outliers forgiven.

fitted = fit(law, {"compute_share": (0.05, 1.0), "overhead_s": (1e-7, 1e-4)}, predict, points, seconds)

Levenberg-Marquardt with a soft-L1 loss (Triggs et al. 2000, "Bundle Adjustment", section 4.3): errors up to about 10 %
count squared, larger ones linearly. Bounds hold by construction: log(coefficient) is a sigmoid of what is solved for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from typing import Any, Generic, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

Model = TypeVar("Model")
Point = TypeVar("Point")
Vector = NDArray[np.float64]
Bounds = Mapping[str, tuple[float, float]]

_SOFT_ERROR = 0.1  # of a log-ratio: beyond, an error counts linearly
_STEPS = 60
_EDGE = 1e-4  # a start on a bound is moved inside by so much of the way


@dataclass(frozen=True, slots=True)
class FitErrors:
    """|predicted − measured| / measured over `n` measurements, as shares; bias: the mean with its sign."""

    n: int
    median: float
    mean: float
    p90: float
    bias: float

    @classmethod
    def of(cls, predicted: Sequence[float] | Vector, measured: Sequence[float] | Vector) -> FitErrors:
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
    """errors: on the points of the fit."""

    model: Model
    errors: FitErrors


def fit(
    model: Model,
    bounds: Bounds,
    predict: Callable[[Model, Point], float],
    points: Sequence[Point],
    seconds: Sequence[float],
) -> FitResult[Model]:
    """The coefficients named in `bounds` (0 < low < high) that fit best, starting from those of `model`.

    law: a dataclass. seconds: measured, above 0, one for each of `points`.
    """
    names, measured = list(bounds), np.log(np.asarray(seconds, float))

    def built(z: Vector) -> Model:
        changes = {name: _inside(*bounds[name], x) for name, x in zip(names, z, strict=True)}
        return cast(Model, replace(cast(Any, model), **changes))

    def residuals(z: Vector) -> Vector:
        candidate = built(z)
        found: Vector = np.log(np.array([predict(candidate, point) for point in points])) - measured
        return found

    z = np.array([_outside(*bounds[name], getattr(model, name)) for name in names])
    best = built(_solve(residuals, z))
    return FitResult(best, FitErrors.of([predict(best, point) for point in points], np.exp(measured)))


def _solve(residuals: Callable[[Vector], Vector], z: Vector) -> Vector:
    damping, current = 1e-2, residuals(z)
    for _ in range(_STEPS):
        weights = 1 / np.sqrt(1 + (current / _SOFT_ERROR) ** 2)
        jacobian = np.stack([(residuals(z + 1e-4 * unit) - current) / 1e-4 for unit in np.eye(len(z))], axis=1)
        normal, gradient = jacobian.T @ (weights[:, None] * jacobian), jacobian.T @ (weights * current)
        scale = np.diag(np.maximum(np.diag(normal), 1e-9))
        for _ in range(8):
            step = -np.linalg.solve(normal + damping * scale, gradient)
            step = np.clip(step, -2, 2)
            there = residuals(z + step)
            gain = _loss(current) - _loss(there)
            if gain > 0:
                break
            damping *= 4
        else:
            return z
        z, current, damping = z + step, there, max(damping / 3, 1e-7)
        if gain < 1e-9 * len(current):
            return z
    return z


def _loss(residuals: Vector) -> float:
    return float((np.sqrt(1 + (residuals / _SOFT_ERROR) ** 2) - 1).sum())


def _inside(low: float, high: float, z: float) -> float:
    share = 1 / (1 + exp(-min(max(z, -40.0), 40.0)))
    return exp(log(low) + (log(high) - log(low)) * share)


def _outside(low: float, high: float, value: float) -> float:
    share = (log(max(value, low)) - log(low)) / (log(high) - log(low))
    share = min(max(share, _EDGE), 1 - _EDGE)
    return log(share / (1 - share))


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
