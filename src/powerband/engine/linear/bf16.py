"""Projections by our own bf16 kernels (kernels/cpu/csrc/linear_bf16.cpp): weights packed once, in huge pages.

    panel = 16 outputs over all inputs, one row of 64 bytes for each pair of inputs (k, k + 1):

        packed[panel, k / 2] = [o0 o0][o1 o1] … [o15 o15]        packed: [ceil(out / 16), inputs / 2, 16, 2]

Outputs are padded with zeros to a multiple of 16, inputs to a multiple of 32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from powerband.engine.huge_pages import huge_empty
from powerband.engine.kernels.cpu import library

PANEL = 16
STEP = 32  # inputs are padded to a multiple of this: one AMX tile


class Bf16Provider:
    """LinearProvider for bfloat16 weights on a CPU. It packs a copy: other users of the weight may keep it."""

    name = "kernel bf16"

    @staticmethod
    def is_available() -> bool:
        return library.load().tier is not None

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Bf16LinearMethod | None:
        """Declines (None) other types and devices, and everything where the kernels could not be built."""
        on_cpu = weight.device.type == "cpu" and weight.dtype is torch.bfloat16
        if not on_cpu or weight.dim() != 2 or not self.is_available():
            return None
        packed = huge_empty(packed_shape(*weight.shape), torch.bfloat16)
        torch.ops.powerband.pack_bf16_out(weight.detach().contiguous(), packed)
        return Bf16LinearMethod(packed, weight.shape[0], None if bias is None else bias.detach().to(torch.bfloat16))


class Bf16LinearMethod:
    """x @ weight.T + bias for x [tokens, in_features]; `packed` and `bias` are what fused operators take."""

    def __init__(self, packed: torch.Tensor, out_features: int, bias: torch.Tensor | None) -> None:
        self.packed = packed
        self.out_features = out_features
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.powerband.linear_bf16(x.contiguous(), self.packed, self.bias, self.out_features)
        return out

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """residual [tokens, out_features] (contiguous) += product of x, rounded once."""
        torch.ops.powerband.linear_bf16_add(x.contiguous(), self.packed, self.bias, residual)

    def packed_operands(self) -> tuple[list[torch.Tensor], int]:
        return [tensor for tensor in (self.packed, self.bias) if tensor is not None], 0

    def argmax(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `FindsLargest.argmax`, of the product without bias."""
        ids, values = torch.ops.powerband.argmax_bf16(x.contiguous(), self.packed, self.out_features)
        return ids, values


def packed_shape(out_features: int, in_features: int) -> tuple[int, int, int, int]:
    return (-(-out_features // PANEL), -(-in_features // STEP) * STEP // 2, PANEL, 2)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """The reference of `powerband::pack_bf16`: weight [out, in] in panels."""
    panels, pairs, _, _ = packed_shape(*weight.shape)
    padded = F.pad(weight, (0, pairs * 2 - weight.shape[1], 0, panels * PANEL - weight.shape[0]))
    return padded.view(panels, PANEL, pairs, 2).permute(0, 2, 1, 3).contiguous()


def unpack(packed: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """The reference of `powerband::unpack_bf16`: what `pack` was given."""
    panels, pairs, _, _ = packed.shape
    return packed.permute(0, 2, 1, 3).reshape(panels * PANEL, pairs * 2)[:out_features, :in_features].contiguous()
