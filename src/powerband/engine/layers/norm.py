"""Root mean square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from powerband.engine.linear.base import parameter

NormKernel = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]  # (x, weight, eps) → norm of x


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension.

    `float32_weight`: multiply before rounding to x's type. Where `weight - 1` is stored, the loader adds the 1.
    `kernel` takes over where a device has something faster.
    """

    def __init__(
        self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device, float32_weight: bool = False
    ) -> None:
        super().__init__()
        self.weight = parameter(size, dtype=torch.float32 if float32_weight else dtype, device=device)
        self.eps = eps
        self.kernel: NormKernel | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kernel is not None:
            return self.kernel(x, self.weight, self.eps)
        if self.weight.dtype != x.dtype:
            return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def norm_heads(x: torch.Tensor, weights: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension of x [tokens, heads, head_dim], with weights [heads, head_dim] of each head."""
    if weights.dtype != x.dtype:
        return F.rms_norm(x.float(), weights.shape[1:], None, eps).mul_(weights).to(x.dtype)
    return F.rms_norm(x, weights.shape[1:], None, eps).mul_(weights)
