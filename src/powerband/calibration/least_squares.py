"""Least squares with coefficients that are not negative."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_ROUNDS = 300
_SMALL = 1e-10


def non_negative(matrix: Array, wanted: Array) -> Array:
    """x ≥ 0 with the least |matrix · x − wanted|, by active sets (Lawson and Hanson 1974, chapter 23)."""
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    scaled = matrix / scale
    count = scaled.shape[1]
    free = np.zeros(count, bool)
    found = np.zeros(count)
    for _ in range(_ROUNDS):
        gradient = scaled.T @ (wanted - scaled @ found)
        gradient[free] = -np.inf
        if free.all() or gradient.max() <= _SMALL:
            break
        free[int(gradient.argmax())] = True
        found = _within(scaled, wanted, free, found)
    solution: Array = found / scale
    return solution


def robust(matrix: Array, wanted: Array, *, scale: float, rounds: int = 8) -> Array:
    """As `non_negative`, but what lies further off than `scale` counts less (soft L1)."""
    weights = np.ones(len(wanted))
    found = np.zeros(matrix.shape[1])
    for _ in range(rounds):
        root = np.sqrt(weights)
        found = non_negative(matrix * root[:, None], wanted * root)
        weights = 1 / np.sqrt(1 + ((matrix @ found - wanted) / scale) ** 2)
    return found


def _within(matrix: Array, wanted: Array, free: NDArray[np.bool_], start: Array) -> Array:
    """The least squares of the free coefficients; those that would be negative are taken out, `free` is changed."""
    current = start
    while free.any():
        trial = np.zeros(matrix.shape[1])
        trial[free] = np.linalg.lstsq(matrix[:, free], wanted, rcond=None)[0]
        if trial[free].min() > 0:
            return trial
        falling = free & (trial <= 0)
        steps = current[falling] / np.maximum(current[falling] - trial[falling], 1e-300)
        current = current + min(float(steps.min()), 1.0) * (trial - current)
        free &= current > _SMALL * max(float(np.abs(current).max()), 1e-300)
        current[~free] = 0.0
    return np.zeros(matrix.shape[1])
