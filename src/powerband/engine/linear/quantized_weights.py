"""Weights in eight and four bits: their form between loaders and kernels, how they are made, what they compute.

    Int8Weight   one scale per output row, symmetric:          weight[o, i] = values[o, i] * scales[o]
    Int4Weight   one scale (and zero) per group of an output row:
                                  weight[o, i] = (values[o, i] - zeros[o, i // group]) * scales[o, i // group]

Everything here is plain torch, and the reference that the C++ kernels are tested against.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

INT8_MAX = 127  # -128 is left out, so that the range is symmetric
INT4_ZERO = 8  # where a symmetric Int4Weight has its zero: values 0..15 stand for -8..7
DEFAULT_GROUP_SIZE = 128
# Fractions of the group's extreme that are tried as the end of the range: clipping it makes all other steps finer. The
# best is then refined: its best scale becomes the step, values are rounded again, and so on. On Gaussian weights this
# leaves 33 % less squared error than max / 7; four times as many ratios leave another 0.2 % less.
_CLIP_RATIOS = tuple(1 - 0.05 * index for index in range(9))
_REFINEMENTS = 2
# A row of activations whose largest magnitude is below this counts as zero: 127 / magnitude must stay finite.
SMALLEST_MAGNITUDE = 1e-30
_SLAB_ELEMENTS = 1 << 18  # of a weight at a time: small enough for the cache


def check_forms(tensors: Mapping[str, torch.Tensor], forms: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """Raises ValueError unless every tensor has the shape and type that `forms` gives its name."""
    for name, tensor in tensors.items():
        if name not in forms or (tuple(tensor.shape), tensor.dtype) != forms[name]:
            raise ValueError(f"'{name}' is {tensor.dtype} {list(tensor.shape)}, which is of no such product")


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """values int8 [out, in], scales float32 [out]."""

    values: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.values.shape[0], self.values.shape[1]


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """values uint8 0..15 [out, in], scales float32 [out, groups], zeros uint8 [out, groups] or None (then 8).

    A group is `group_size` neighbouring inputs of one output; the last one is shorter where they do not divide evenly.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.values.shape[0], self.values.shape[1]


def quantize_int8(weight: torch.Tensor) -> Int8Weight:
    """The nearest Int8Weight to a weight [out, in], with scale = max |row| / 127; rounded as activations are."""
    out_features, in_features = weight.shape
    values = torch.empty(out_features, in_features, dtype=torch.int8)
    scales = torch.empty(out_features)
    for rows in _slabs(out_features, in_features):
        values[rows], scales[rows] = quantize_rows(weight[rows])
    return Int8Weight(values, scales)


def quantize_int4(weight: torch.Tensor, group_size: int = DEFAULT_GROUP_SIZE) -> Int4Weight:
    """An Int4Weight with zero 8 near a weight [out, in]. A group that holds NaN or infinity has a scale like that.

    Per group: the extreme value (or a fraction of it, see _CLIP_RATIOS) gets the longer end, -8, as llama.cpp's Q4_0
    does; of the resulting integers q, those with the least squared error are kept, each q with its best scale
    (w . q) / (q . q). The squared error is then |w|^2 - (w . q)^2 / (q . q).
    """
    out_features, in_features = weight.shape
    groups = -(-in_features // group_size)
    values = torch.empty(out_features, in_features, dtype=torch.uint8)
    scales = torch.empty(out_features, groups)
    for rows in _slabs(out_features, in_features):
        slab = F.pad(weight[rows].float(), (0, groups * group_size - in_features))
        quantized, scales[rows] = _fit_int4(slab.view(slab.shape[0], groups, group_size))
        values[rows] = quantized.add_(INT4_ZERO).flatten(1)[:, :in_features]
    return Int4Weight(values, scales, None, group_size)


def dequantize(weight: Int8Weight | Int4Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight [out, in] that these integers stand for: exact products in float32, then rounded to `dtype`."""
    out = torch.empty(weight.shape, dtype=dtype)
    for rows in _slabs(*weight.shape):
        if isinstance(weight, Int8Weight):
            out[rows] = weight.values[rows] * weight.scales[rows, None]
        else:
            zeros = INT4_ZERO if weight.zeros is None else _spread(weight.zeros[rows].float(), weight)
            out[rows] = (weight.values[rows].float() - zeros) * _spread(weight.scales[rows], weight)
    return out


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations [..., k] as int8 [..., k] and float32 scales [...], per token and symmetric: scale = max |row| / 127.

    A row that holds NaN or infinity becomes zeros with the scale NaN, so that all it leads to is NaN.
    """
    wide = x.float()
    magnitude = wide.abs().amax(-1, keepdim=True) if x.shape[-1] else wide.new_zeros(*x.shape[:-1], 1)
    magnitude = magnitude.where(magnitude >= SMALLEST_MAGNITUDE, magnitude * 0)  # keeps NaN
    inverse = torch.where(magnitude > 0, torch.tensor(float(INT8_MAX)) / magnitude, 0)
    values = (wide * inverse).nan_to_num(0, 0, 0).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    scales = magnitude * torch.tensor(1 / INT8_MAX)
    return values, scales.where(magnitude.isfinite(), torch.nan).squeeze(-1)


def int8_product(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [tokens, in] @ weight.T + bias as the kernels compute it: whole numbers exactly, then scales, bias, rounding.

    Sums of products of int8 are exact in float64. Returns x's dtype, [tokens, out].
    """
    values, scales = quantize_rows(x)
    whole = (values.double() @ weight.values.double().T).float()
    product = whole * (scales[:, None] * weight.scales)
    return (product if bias is None else product + bias.float()).to(x.dtype)


def _fit_int4(slab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers -8..7 [rows, groups, group_size] (float32), and scales [rows, groups]."""
    extreme = torch.where(slab.amax(-1) > -slab.amin(-1), slab.amax(-1), slab.amin(-1))
    extreme = extreme.where(extreme.abs() >= SMALLEST_MAGNITUDE, extreme * 0)  # keeps NaN
    best = torch.zeros_like(slab)
    best_merit = torch.full_like(extreme, -1.0)
    best_scale = extreme
    for ratio in (*_CLIP_RATIOS, *[None] * _REFINEMENTS):
        step = best_scale if ratio is None else extreme * (ratio / -INT4_ZERO)
        quantized = (slab * (1 / _nonzero(step))[..., None]).round_().clamp_(-INT4_ZERO, INT4_ZERO - 1)
        overlap = torch.linalg.vecdot(slab, quantized)
        scale = overlap / _nonzero(torch.linalg.vecdot(quantized, quantized))
        merit = overlap * scale
        better = merit > best_merit
        best = torch.where(better[..., None], quantized, best)
        best_scale = torch.where(better, scale, best_scale)
        best_merit = torch.where(better, merit, best_merit)
    return best, best_scale


def _slabs(rows: int, row_size: int) -> Iterator[slice]:
    """Some rows of a weight at a time, so that what is computed on the way stays small."""
    step = max(1, _SLAB_ELEMENTS // max(row_size, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _nonzero(x: torch.Tensor) -> torch.Tensor:
    """x, with ones instead of zeros: to divide zeros by."""
    return x.where(x != 0, 1.0)


def _spread(per_group: torch.Tensor, weight: Int4Weight) -> torch.Tensor:
    """[rows, groups] → [rows, in]: every input has its group's number."""
    return per_group.repeat_interleave(weight.group_size, dim=1)[:, : weight.shape[1]]
