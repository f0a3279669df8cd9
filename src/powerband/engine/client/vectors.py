"""What is computed of pooled vectors outside the engine."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def as_rows(vectors: list[bytes]) -> Floats:
    """Vectors as the engine sends them → [vectors, dimensions]."""
    return np.stack([np.frombuffer(vector, np.float32) for vector in vectors])


def cosine(first: Floats, second: Floats) -> list[float]:
    """Of each row of `second` and its row of `first`, or the only one there: [pairs]."""
    sizes = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    found: list[float] = ((first * second).sum(axis=1) / np.maximum(sizes, 1e-12)).tolist()
    return found
