"""Muon: momentum whose update is made orthogonal, for the matrices of a transformer.

Keller Jordan et al., https://kellerjordan.github.io/posts/muon/ (2024). It learns a small model in markedly
fewer steps than AdamW, which remains the choice for embeddings and norms.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Muon:
    """One momentum buffer per matrix; `lr` is set by whoever drives the schedule."""

    def __init__(self, matrices: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        self.lr, self._momentum, self._weight_decay = lr, momentum, weight_decay
        self._matrices = matrices
        self._buffers = [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self) -> None:
        """Apply the gradients and clear them. Matrices of one shape are made orthogonal together."""
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for matrix, buffer in zip(self._matrices, self._buffers, strict=True):
            assert matrix.grad is not None
            buffer.lerp_(matrix.grad, 1 - self._momentum)
            nesterov = matrix.grad.lerp(buffer, self._momentum)
            by_shape.setdefault(matrix.shape, []).append((matrix, nesterov))
            matrix.grad = None
        for shape, pairs in by_shape.items():
            updates = orthogonal(torch.stack([update for _, update in pairs]))
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for (matrix, _), update in zip(pairs, updates, strict=True):
                matrix.mul_(1 - self.lr * self._weight_decay).add_(update, alpha=-self.lr * scale)


def orthogonal(matrices: Tensor, rounds: int = 4) -> Tensor:
    """The nearest orthogonal matrices to [n, rows, columns], roughly: Newton-Schulz with the quintic of the source."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()
