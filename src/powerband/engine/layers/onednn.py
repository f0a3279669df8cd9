"""Projections by oneDNN with weights packed once: on a CPU faster than `F.linear` for few rows in bfloat16."""

from __future__ import annotations

import torch

from powerband.engine.layers.linear import Product


class PackedLinear:
    """LinearProvider for 16-bit weights on a CPU.

    keep: weights that someone else reads, too, and that must therefore stay as they are (tied embeddings).
    """

    name = "onednn"

    def __init__(self, keep: torch.Tensor | None = None) -> None:
        self._keep = keep

    @staticmethod
    def is_available() -> bool:
        return hasattr(torch.ops.mkldnn, "_linear_pointwise")

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product | None:
        if weight.device.type != "cpu" or weight.dtype is not torch.bfloat16 or weight is self._keep:
            return None
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)

        def product(x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
            return out

        return product
