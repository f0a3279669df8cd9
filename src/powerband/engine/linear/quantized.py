"""Projections with weights in 8 or 4 bits: by the kernels where there are any, else by their references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from powerband.engine.linear.base import LinearMethod
from powerband.engine.linear.int4 import Int4LinearMethod
from powerband.engine.linear.int8 import Int8LinearMethod
from powerband.engine.linear.quantized_weights import (
    INT4_ZERO,
    Int4Weight,
    Int8Weight,
    dequantize,
    int8_product,
    quantize_int4,
    quantize_int8,
)
from powerband.errors import UsageError
from powerband.spec.checkpoint.quantization import DEFAULT_GROUP


class QuantizedProvider:
    """LinearProvider that holds weights in 8 bits, one scale per output, or in 4, one per `group_size` inputs of it.

    kernels: compute with the C++ kernels; without them plain torch does, slowly.
    """

    def __init__(self, held: Literal["int8", "int4"], *, group_size: int = DEFAULT_GROUP, kernels: bool) -> None:
        self.name = kernel_name(held, kernels=kernels)
        self._held = held
        self._group_size = group_size
        self._kernels = kernels

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> LinearMethod:
        """Raises UsageError for a weight that is not finite."""
        method: LinearMethod
        if self._held == "int8":
            if self._kernels and Int8LinearMethod.quantizes(weight):
                method = Int8LinearMethod.quantizing(weight, bias)
            else:
                method = quantized_method(quantize_int8(weight), bias, kernels=self._kernels)
        elif self._kernels and Int4LinearMethod.quantizes(weight, self._group_size):
            method = Int4LinearMethod.quantizing(weight, self._group_size, bias)
        else:
            method = quantized_method(quantize_int4(weight, self._group_size), bias, kernels=self._kernels)
        _check_finite(method)
        return method


def kernel_name(held: str, *, kernels: bool) -> str:
    """The name of what computes, for summaries."""
    return f"kernel {held}" if kernels else held


def _check_finite(method: LinearMethod) -> None:
    """NaN and infinity have no integer; a weight that holds one has such a scale, too."""
    if not bool(tensors_of(method)["scales"].isfinite().all()):
        raise UsageError(
            "This weight holds values that are not finite, and cannot be quantized.",
            hint="Serve the checkpoint without --quantization, or repair it.",
        )


def quantized_method(weight: Int8Weight | Int4Weight, bias: torch.Tensor | None, *, kernels: bool) -> LinearMethod:
    """The product with a weight that is quantized already."""
    if kernels and isinstance(weight, Int4Weight) and Int4LinearMethod.takes(weight):
        return Int4LinearMethod.from_weight(weight, bias)
    if kernels and isinstance(weight, Int8Weight) and Int8LinearMethod.takes(weight):
        return Int8LinearMethod.from_weight(weight, bias)
    return ReferenceLinearMethod(weight, bias)


def tensors_of(method: LinearMethod) -> dict[str, torch.Tensor]:
    """The tensors that a product is made of, by name; empty for products without `tensors`."""
    tensors = getattr(method, "tensors", None)
    return tensors() if tensors is not None else {}


class ReferenceLinearMethod:
    """In plain torch: used where no kernel is, and the reference for the kernels."""

    def __init__(self, weight: Int8Weight | Int4Weight, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def tensors(self) -> dict[str, torch.Tensor]:
        zeros = self._weight.zeros if isinstance(self._weight, Int4Weight) else None
        held = {"values": self._weight.values, "scales": self._weight.scales}
        return held if zeros is None else {**held, "zeros": zeros}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self._weight, Int8Weight):
            return int8_product(x, self._weight, self._bias)
        return F.linear(x, dequantize(self._weight, x.dtype), self._bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        residual.add_(self(x))


# ---- weights that a checkpoint stores quantized


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A matrix [out, in] that is quantized. `order`: the input that each of its columns belongs to; None: in order."""

    weight: Int8Weight | Int4Weight
    order: torch.Tensor | None


def stored_method(pieces: Sequence[QuantizedMatrix], bias: torch.Tensor | None, *, kernels: bool) -> LinearMethod:
    """The product with all pieces, one below the other: q, k and v, or gate and up."""
    if len(pieces) > 1 and all(_joins(pieces[0], piece) for piece in pieces):
        pieces = [QuantizedMatrix(_joined([piece.weight for piece in pieces]), pieces[0].order)]
    if len(pieces) == 1:
        method = quantized_method(pieces[0].weight, bias, kernels=kernels)
        return method if pieces[0].order is None else PermutedLinearMethod(method, pieces[0].order)
    sizes = [piece.weight.shape[0] for piece in pieces]
    biases = [None] * len(pieces) if bias is None else torch.split(bias, sizes)
    apart = zip(pieces, biases, strict=True)
    return ConcatenatedLinearMethod([stored_method([piece], own, kernels=kernels) for piece, own in apart])


def _joins(first: QuantizedMatrix, other: QuantizedMatrix) -> bool:
    a, b = first.weight, other.weight
    if isinstance(a, Int4Weight) and (not isinstance(b, Int4Weight) or a.group_size != b.group_size):
        return False
    if first.order is None or other.order is None:
        return first.order is other.order and type(a) is type(b)
    return type(a) is type(b) and torch.equal(first.order, other.order)


def _joined(weights: Sequence[Int8Weight | Int4Weight]) -> Int8Weight | Int4Weight:
    values = torch.cat([weight.values for weight in weights])
    scales = torch.cat([weight.scales for weight in weights])
    fours = [weight for weight in weights if isinstance(weight, Int4Weight)]
    if not fours:
        return Int8Weight(values, scales)
    zeros = None
    if any(weight.zeros is not None for weight in fours):
        usual = (torch.full_like(w.scales, INT4_ZERO, dtype=torch.uint8) if w.zeros is None else w.zeros for w in fours)
        zeros = torch.cat(list(usual))
    return Int4Weight(values, scales, zeros, fours[0].group_size)


class PermutedLinearMethod:
    """A product whose weight has its inputs in another order."""

    def __init__(self, method: LinearMethod, order: torch.Tensor) -> None:
        self._method = method
        self._order = order

    def tensors(self) -> dict[str, torch.Tensor]:
        return {**tensors_of(self._method), "order": self._order}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._method(x.index_select(-1, self._order))

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        self._method.add_to(residual, x.index_select(-1, self._order))


class ConcatenatedLinearMethod:
    """Products with the same input, their outputs one after the other."""

    def __init__(self, methods: Sequence[LinearMethod]) -> None:
        self._methods = methods

    def tensors(self) -> dict[str, torch.Tensor]:
        every = [tensors_of(method) for method in self._methods]
        return {f"{index}.{name}": tensor for index, named in enumerate(every) for name, tensor in named.items()}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([method(x) for method in self._methods], dim=-1)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        residual.add_(self(x))
