"""Projections with weights in 8 or 4 bits: by the kernels where there are any, else by their references."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from powerband.engine.layers.linear import Product
from powerband.engine.layers.quantized import (
    Int4Weight,
    Int8Weight,
    dequantize,
    int8_product,
    quantize_int4,
    quantize_int8,
)
from powerband.errors import UsageError
from powerband.spec.quantization import DEFAULT_GROUP


class Int8Linear:
    """LinearProvider that holds weights in 8 bits, one scale per output; activations are rounded per token."""

    name = "int8"

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        quantized = quantize_int8(weight)
        _check_finite(quantized)
        return quantized_product(quantized, bias)


class Int4Linear:
    """LinearProvider that holds weights in 4 bits, one scale per `group_size` inputs of an output."""

    name = "int4"

    def __init__(self, group_size: int = DEFAULT_GROUP) -> None:
        self._group_size = group_size

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        quantized = quantize_int4(weight, self._group_size)
        _check_finite(quantized)
        return quantized_product(quantized, bias)


def _check_finite(weight: Int8Weight | Int4Weight) -> None:
    """NaN and infinity have no integer; a weight that holds one has such a scale, too."""
    if not bool(weight.scales.isfinite().all()):
        raise UsageError(
            "This weight holds values that are not finite, and cannot be quantized.",
            hint="Serve the checkpoint without --quantization, or repair it.",
        )


def quantized_product(weight: Int8Weight | Int4Weight, bias: torch.Tensor | None) -> Product:
    """The fastest product with a weight that is quantized already."""
    return ReferenceProduct(weight, bias)


class ReferenceProduct:
    """In plain torch. It serves where no kernel does, and says what the kernels must compute."""

    def __init__(self, weight: Int8Weight | Int4Weight, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    @property
    def memory_bytes(self) -> int:
        weight = self._weight
        zeros = weight.zeros if isinstance(weight, Int4Weight) else None
        return sum(t.numel() * t.element_size() for t in (weight.values, weight.scales, zeros) if t is not None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self._weight, Int8Weight):
            return int8_product(x, self._weight, self._bias)
        return F.linear(x, dequantize(self._weight, x.dtype), self._bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        residual.add_(self(x))
