"""Products with weights in int4, by the kernels of kernels/cpu/csrc/linear_int4.cpp.

    panel = 16 outputs over all inputs; block = eight inputs k … k + 7 of it, 64 bytes:

        packed[panel, k / 8, output, j] = values[k + j] | values[k + 4 + j] << 4           j < 4
        scales[panel, group, output], zeros likewise: what belongs to a panel's group is one vector

Few rows of activations are quantized, too (int8, one scale per row and group); many rows are multiplied in bf16 where
the processor has tiles for it. Other types than bf16 are computed in plain torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from powerband.engine.huge_pages import huge_empty
from powerband.engine.kernels.cpu import library
from powerband.engine.linear.quantized_weights import Int4Weight, check_forms, dequantize
from powerband.errors import UsageError

PANEL = 16
BLOCK = 8
SMALLEST_GROUP = 32


class Int4LinearMethod:
    """x @ weight.T + bias for x [tokens, in_features]."""

    def __init__(
        self,
        packed: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
        sizes: tuple[int, int, int],
    ) -> None:
        """`packed`, `scales` and `zeros` as in the module's drawing; sizes: (out_features, in_features, group_size)."""
        self.packed = packed
        self.scales = scales
        self.zeros = zeros
        self.bias = bias
        self.out_features, self.in_features, self.group_size = sizes

    @staticmethod
    def takes(weight: Int4Weight) -> bool:
        """Whether the kernels are there, and take groups of this size."""
        fits = takes_group(weight.shape[1], weight.group_size)
        return fits and weight.values.device.type == "cpu" and library.load().tier is not None

    @classmethod
    def from_weight(cls, weight: Int4Weight, bias: torch.Tensor | None = None) -> Int4LinearMethod:
        """Packs. Raises UsageError for groups that the kernels cannot take."""
        out_features, in_features = weight.shape
        if not cls.takes(weight):
            raise UsageError(
                f"The CPU kernels do not take int4 weights in groups of {weight.group_size}, or are not there.",
                hint=f"Use a group size that is a multiple of {BLOCK} and at least {SMALLEST_GROUP} (128 is usual).",
            )
        packed = huge_empty(packed_shape(out_features, in_features), torch.uint8)
        torch.ops.powerband.pack_int4_out(weight.values.contiguous(), packed)
        return cls(
            packed,
            by_panel(weight.scales),
            None if weight.zeros is None else by_panel(weight.zeros),
            None if bias is None else bias.detach().to(torch.bfloat16),
            (out_features, in_features, weight.group_size),
        )

    @classmethod
    def quantizing(cls, weight: torch.Tensor, group_size: int, bias: torch.Tensor | None = None) -> Int4LinearMethod:
        """The product with `quantize_int4(weight, group_size)`, but for ties; weight: bfloat16 [out, in]."""
        out_features, in_features = weight.shape
        packed = huge_empty(packed_shape(out_features, in_features), torch.uint8)
        scales = huge_empty((packed.shape[0], -(-in_features // group_size), PANEL), torch.float32)
        torch.ops.powerband.quantize_int4_out(weight.detach().contiguous(), group_size, packed, scales)
        own_bias = None if bias is None else bias.detach().to(torch.bfloat16)
        return cls(packed, scales, None, own_bias, (out_features, in_features, group_size))

    @staticmethod
    def quantizes(weight: torch.Tensor, group_size: int) -> bool:
        """Whether `quantizing` takes this weight here."""
        on_cpu = weight.device.type == "cpu" and weight.dtype is torch.bfloat16
        fits = weight.dim() == 2 and weight.shape[0] > 0 and weight.shape[1] > 0
        return on_cpu and fits and takes_group(weight.shape[1], group_size) and library.load().tier is not None

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> Int4LinearMethod:
        """The product whose `tensors()` these are. Raises ValueError for shapes that would mislead the kernels."""
        out_features, in_features, group_size = tensors["sizes"].tolist()
        if min(out_features, in_features, group_size) < 1 or not takes_group(in_features, group_size):
            raise ValueError(f"sizes {out_features}, {in_features} and {group_size} are of no product")
        packed = packed_shape(out_features, in_features)
        groups = (packed[0], -(-in_features // group_size), PANEL)
        forms = {"packed": (packed, torch.uint8), "scales": (groups, torch.float32), "zeros": (groups, torch.uint8)}
        check_forms(tensors, {**forms, "bias": ((out_features,), torch.bfloat16), "sizes": ((3,), torch.int64)})
        return cls(
            tensors["packed"],
            tensors["scales"],
            tensors.get("zeros"),
            tensors.get("bias"),
            (out_features, in_features, group_size),
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that this product is made of, for a cache of packed weights."""
        named = {"packed": self.packed, "scales": self.scales, "zeros": self.zeros, "bias": self.bias}
        sizes = torch.tensor([self.out_features, self.in_features, self.group_size])
        return {name: tensor for name, tensor in named.items() if tensor is not None} | {"sizes": sizes}

    def weight(self) -> Int4Weight:
        """What was packed."""
        values = unpack(self.packed, self.out_features, self.in_features)
        scales = from_panels(self.scales, self.out_features)
        zeros = None if self.zeros is None else from_panels(self.zeros, self.out_features)
        return Int4Weight(values, scales, zeros, self.group_size)

    @property
    def memory_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not _kernel_takes(x):
            return self._reference(x)
        out: torch.Tensor = torch.ops.powerband.linear_int4(x.contiguous(), *self._operands())
        return out

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """residual [tokens, out_features] (contiguous) += product of x, rounded once."""
        if not _kernel_takes(x):
            residual.add_(self._reference(x))
            return
        torch.ops.powerband.linear_int4_add(x.contiguous(), *self._operands(), residual)

    def packed_operands(self) -> tuple[list[torch.Tensor], int]:
        held = (self.packed, self.scales, self.zeros, self.bias)
        return [tensor for tensor in held if tensor is not None], self.group_size

    def _operands(self) -> tuple[object, ...]:
        return (self.packed, self.scales, self.zeros, self.bias, self.out_features, self.group_size)

    def _reference(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, dequantize(self.weight(), x.dtype), bias)


def takes_group(in_features: int, group_size: int) -> bool:
    """Whether the kernels take groups of this size."""
    return group_size >= in_features or (group_size >= SMALLEST_GROUP and group_size % BLOCK == 0)


def packed_shape(out_features: int, in_features: int) -> tuple[int, int, int, int]:
    return (-(-out_features // PANEL), -(-in_features // BLOCK), PANEL, 4)


def pack(values: torch.Tensor) -> torch.Tensor:
    """The reference of `powerband::pack_int4`: values uint8 0..15 [out, in] in panels."""
    panels, blocks, _, _ = packed_shape(*values.shape)
    padded = F.pad(values, (0, blocks * BLOCK - values.shape[1], 0, panels * PANEL - values.shape[0]))
    low, high = padded.view(panels, PANEL, blocks, 2, 4).permute(0, 2, 3, 1, 4).unbind(2)
    return low | high << 4


def unpack(packed: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """The reference of `powerband::unpack_int4`: what `pack` was given."""
    panels, blocks, _, _ = packed.shape
    values = torch.stack((packed & 15, packed >> 4), dim=2).permute(0, 3, 1, 2, 4)
    return values.reshape(panels * PANEL, blocks * BLOCK)[:out_features, :in_features].contiguous()


def by_panel(per_group: torch.Tensor) -> torch.Tensor:
    """[out, groups] → [panels, groups, 16], zero beyond the last output."""
    out_features, groups = per_group.shape
    panels = -(-out_features // PANEL)
    ordered = huge_empty((panels, groups, PANEL), per_group.dtype)
    padded = F.pad(per_group, (0, 0, 0, panels * PANEL - out_features))
    return ordered.copy_(padded.view(panels, PANEL, groups).transpose(1, 2))


def from_panels(ordered: torch.Tensor, out_features: int) -> torch.Tensor:
    """What `by_panel` was given."""
    return ordered.transpose(1, 2).reshape(-1, ordered.shape[1])[:out_features].contiguous()


def _kernel_takes(x: torch.Tensor) -> bool:
    return x.dtype is torch.bfloat16 and library.load().tier is not None
