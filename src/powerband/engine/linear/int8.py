"""Projections with weights in int8: the kernels of kernels/cpu/csrc/linear_int8.cpp, packed once, in huge pages.

    panel = 16 outputs over all inputs, one row of 64 bytes for each four inputs k … k + 3:

        packed[panel, k / 4] = [o0 o0 o0 o0][o1 o1 o1 o1] … [o15 o15 o15 o15]

Outputs are padded with zeros to a multiple of 16, inputs to a multiple of 64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from powerband.engine.huge_pages import huge_empty
from powerband.engine.kernels.cpu import library
from powerband.engine.linear.quantized_weights import Int8Weight, check_forms, int8_product

PANEL = 16
STEP = 64  # inputs are padded to a multiple of this: one row of an AMX tile
MAX_FEATURES = 1 << 16  # inputs: sums of more products might not fit in 32 bits


class Int8LinearMethod:
    """x @ weight.T + bias for x [tokens, in_features]; activations are rounded to int8, one scale per token."""

    def __init__(
        self,
        packed: torch.Tensor,
        scales: torch.Tensor,
        sums: torch.Tensor,
        bias: torch.Tensor | None,
        in_features: int,
    ) -> None:
        """packed: see the module's drawing; scales float32 [out]; sums int32 [out]: of each output's values."""
        self.packed = packed
        self.scales = scales
        self.sums = sums
        self.bias = bias
        self.in_features = in_features
        self.out_features = scales.shape[0]

    @staticmethod
    def takes(weight: Int8Weight) -> bool:
        """Whether the kernels exist here, and take a weight of this size."""
        on_cpu = weight.values.device.type == "cpu"
        return (
            on_cpu and 0 < weight.shape[1] <= MAX_FEATURES and weight.shape[0] > 0 and library.load().tier is not None
        )

    @classmethod
    def from_weight(cls, weight: Int8Weight, bias: torch.Tensor | None = None) -> Int8LinearMethod:
        """Packs a weight that the kernels take."""
        packed = huge_empty(packed_shape(*weight.shape), torch.int8)
        torch.ops.powerband.pack_int8_out(weight.values.contiguous(), packed)
        return cls(
            packed,
            weight.scales.float().contiguous(),
            weight.values.sum(1, dtype=torch.int32),
            None if bias is None else bias.detach().to(torch.bfloat16),
            weight.shape[1],
        )

    @classmethod
    def quantizing(cls, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Int8LinearMethod:
        """The product with `quantize_int8(weight)` of a bfloat16 weight [out, in], never unpacked."""
        out_features, in_features = weight.shape
        packed = huge_empty(packed_shape(out_features, in_features), torch.int8)
        scales, sums = torch.empty(out_features), torch.empty(out_features, dtype=torch.int32)
        torch.ops.powerband.quantize_int8_out(weight.detach().contiguous(), packed, scales, sums)
        return cls(packed, scales, sums, None if bias is None else bias.detach().to(torch.bfloat16), in_features)

    @staticmethod
    def quantizes(weight: torch.Tensor) -> bool:
        """Whether `quantizing` takes this weight here."""
        on_cpu = weight.device.type == "cpu" and weight.dtype is torch.bfloat16
        fits = weight.dim() == 2 and weight.shape[0] > 0 and 0 < weight.shape[1] <= MAX_FEATURES
        return on_cpu and fits and library.load().tier is not None

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> Int8LinearMethod:
        """The product whose `tensors()` these are. Raises ValueError for shapes that would mislead the kernels."""
        in_features, out_features = int(tensors["in_features"].item()), tensors["scales"].numel()
        if not 0 < in_features <= MAX_FEATURES or not out_features:
            raise ValueError(f"{in_features} inputs and {out_features} outputs are of no product")
        each = (out_features,)
        forms = {"packed": (packed_shape(out_features, in_features), torch.int8), "scales": (each, torch.float32)}
        rest = {"sums": (each, torch.int32), "bias": (each, torch.bfloat16), "in_features": ((), torch.int64)}
        check_forms(tensors, {**forms, **rest})
        return cls(tensors["packed"], tensors["scales"], tensors["sums"], tensors.get("bias"), in_features)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that this product is made of, for a cache of packed weights."""
        named = {"packed": self.packed, "scales": self.scales, "sums": self.sums, "bias": self.bias}
        sizes = {"in_features": torch.tensor(self.in_features)}
        return {name: tensor for name, tensor in named.items() if tensor is not None} | sizes

    def weight(self) -> Int8Weight:
        """What was packed."""
        values = torch.ops.powerband.unpack_int8(self.packed, self.out_features, self.in_features)
        return Int8Weight(values, self.scales)

    @property
    def memory_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype is not torch.bfloat16:
            return int8_product(x, self.weight(), self.bias)
        out: torch.Tensor = torch.ops.powerband.linear_int8(x.contiguous(), *self._operands(), self.out_features)
        return out

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """residual [tokens, out_features] (contiguous) += product of x, rounded once."""
        if x.dtype is not torch.bfloat16:
            residual.add_(self(x))
        else:
            torch.ops.powerband.linear_int8_add(x.contiguous(), *self._operands(), residual)

    def packed_operands(self) -> tuple[list[torch.Tensor], int]:
        return [tensor for tensor in self._operands() if tensor is not None], 0

    def argmax(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `FindsLargest.argmax`."""
        if x.dtype is not torch.bfloat16:
            values, ids = int8_product(x, self.weight(), None).float().max(-1)
            return ids, values
        ids, values = torch.ops.powerband.argmax_int8(x.contiguous(), self.packed, self.scales, self.sums)
        return ids, values

    def _operands(self) -> tuple[torch.Tensor | None, ...]:
        return self.packed, self.scales, self.sums, self.bias


def packed_shape(out_features: int, in_features: int) -> tuple[int, int, int, int]:
    return (-(-out_features // PANEL), -(-in_features // STEP) * STEP // 4, PANEL, 4)


def pack(values: torch.Tensor) -> torch.Tensor:
    """The reference of `powerband::pack_int8`: values int8 [out, in] in panels."""
    panels, fours, _, _ = packed_shape(*values.shape)
    padded = F.pad(values, (0, fours * 4 - values.shape[1], 0, panels * PANEL - values.shape[0]))
    return padded.view(panels, PANEL, fours, 4).transpose(1, 2).contiguous()
