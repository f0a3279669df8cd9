"""Projections by oneDNN with weights packed once: on a CPU faster than `F.linear`, above all for few rows."""

from __future__ import annotations

import torch

from powerband.engine.linear.base import LinearMethod

# Below this many elements a float32 product by F.linear is as fast or faster (measured: 0.5 M slower, 6 M faster).
_LARGE_FLOAT32 = 1 << 20


class OneDnnProvider:
    """LinearProvider for bfloat16 weights and large float32 weights on a CPU.

    keep: weights that are read elsewhere, too, and must stay as they are (tied embeddings).
    """

    name = "onednn"

    def __init__(self, keep: torch.Tensor | None = None) -> None:
        self._keep = keep

    @staticmethod
    def is_available() -> bool:
        return hasattr(torch.ops.mkldnn, "_linear_pointwise")

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> LinearMethod | None:
        if weight.device.type != "cpu" or weight is self._keep or not _pays(weight):
            return None
        return _OneDnnLinearMethod(torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1), bias)


class _OneDnnLinearMethod:
    def __init__(self, packed: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._packed = packed
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        residual.add_(self(x))


def _pays(weight: torch.Tensor) -> bool:
    if weight.dtype is torch.float32:
        return weight.numel() >= _LARGE_FLOAT32
    return weight.dtype is torch.bfloat16
