"""Projections of checkpoints that are quantized already: GPTQ, AWQ and compressed-tensors, as their tools pack them.

An int32 holds 8 values of 4 bits or 4 of 8, the first in the lowest bits. Which dimension they are packed along
differs:

    method               values                            scales, zeros                    weight[o, i] =
    gptq                 qweight [in / 8, out]             [groups, out], [groups, out / 8]  (value - zero) * scale
    awq                  qweight [in, out / 8], shuffled   the same, zeros shuffled          (value - zero) * scale
    compressed-tensors   weight_packed [out, in / 8]       [out, groups], [out / 8, groups]  (value - zero) * scale
    … int-quantized      weight int8 [out, in]             [out, 1], [out, 1]                (value - zero) * scale

GPTQ's first format stores zero - 1. Compressed-tensors' packed values and zeros are shifted by half their range. The
group of input i is i // group_size, or g_idx[i] where inputs were grouped in order of activation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from powerband.engine.linear.quantized import QuantizedMatrix
from powerband.engine.linear.quantized_weights import INT4_ZERO, Int4Weight, Int8Weight, quantize_int8
from powerband.engine.model_loader.stored_tensors import StoredTensors
from powerband.errors import UsageError
from powerband.spec.checkpoint.quantization import DEFAULT_GROUP, WeightFormat

# AutoAWQ's gemm layout: the n-th value of an int32 belongs to this one of eight neighbouring outputs.
_AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)
_GROUP_STEP = 8  # the int4 product takes groups of a multiple of this
_REQUIRED = {
    "gptq": ("qweight", "qzeros", "scales"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape"),
    "int-quantized": ("weight", "weight_scale"),
}
_OPTIONAL = {
    "gptq": ("g_idx",),
    "awq": (),
    "compressed-tensors": ("weight_zero_point", "weight_g_idx", "input_scale", "input_zero_point"),
    "int-quantized": ("weight_zero_point", "input_scale", "input_zero_point"),
}


@dataclass(slots=True)
class _Raw:
    """What every method comes down to. zeros may be None: then half the range."""

    values: torch.Tensor  # uint8 [out, in]
    scales: torch.Tensor  # [out, groups]
    zeros: torch.Tensor | None  # uint8 [out, groups]
    groups_of_inputs: torch.Tensor | None = None  # [in]


class QuantizedCheckpoint:
    """Reads the projections that are stored in `format`."""

    def __init__(self, format: WeightFormat, tensors: StoredTensors) -> None:
        self.format = format
        self._tensors = tensors
        self._kind = format.method if format.packed else "int-quantized"
        self._unpack: Callable[[str, list[int]], _Raw] = {
            "gptq": self._gptq,
            "awq": self._awq,
            "compressed-tensors": self._packed,
            "int-quantized": self._plain,
        }[self._kind]

    def holds(self, name: str) -> bool:
        """Whether the weight of this name (ending in .weight) is stored quantized."""
        first = f"{_base(name)}.{_REQUIRED[self._kind][0]}"
        if self._kind == "int-quantized":
            return first in self._tensors and self._tensors.dtype(first) is torch.int8
        return first in self._tensors and name.endswith(".weight")

    def required(self, name: str) -> list[str]:
        """The tensors that stand for this weight."""
        return [f"{_base(name)}.{part}" for part in _REQUIRED[self._kind]]

    def optional(self, name: str) -> list[str]:
        return [f"{_base(name)}.{part}" for part in _OPTIONAL[self._kind]]

    def read(self, name: str, shape: Collection[int]) -> QuantizedMatrix:
        """The weight of this name, which must be [out, in] = `shape`. Raises UsageError, naming what does not fit."""
        out_features, in_features = shape
        raw = self._unpack(_base(name), [out_features, in_features])
        order, group_size = self._grouping(name, raw, in_features)
        if order is not None:
            raw.values = raw.values[:, order]
        scales = raw.scales.float().contiguous()
        if not bool(scales.isfinite().all()):
            raise _wrong(name, "it has scales that are not finite")
        if self.format.bits == 8:
            return QuantizedMatrix(_eight_bits(raw, scales, group_size), order)
        zeros = raw.zeros
        if zeros is not None and bool((zeros == INT4_ZERO).all()):
            zeros = None
        return QuantizedMatrix(_four_bits(name, raw.values, scales, zeros, group_size), order)

    # ---- one method for each kind of checkpoint

    def _gptq(self, base: str, shape: list[int]) -> _Raw:
        bits, out_features, in_features = self.format.bits, *shape
        per_word = 32 // bits
        values = _unpacked(self._tensor(base, "qweight", [in_features // per_word, out_features]), bits, dim=0)
        scales = self._scales(base, "scales", transposed=True, outputs=out_features)
        stored = self._tensor(base, "qzeros", [scales.shape[1], out_features // per_word])
        zeros = _unpacked(stored, bits, dim=1)
        if self.format.zeros_minus_one:
            zeros = zeros + 1 if bits == 8 else (zeros + 1) & 15  # uint8 wraps by itself
        groups = self._tensor(base, "g_idx", [in_features]) if f"{base}.g_idx" in self._tensors else None
        return _Raw(values.t().contiguous(), scales, zeros.t().contiguous(), groups)

    def _awq(self, base: str, shape: list[int]) -> _Raw:
        out_features, in_features = shape
        values = _awq_unpacked(self._tensor(base, "qweight", [in_features, out_features // 8]))
        scales = self._scales(base, "scales", transposed=True, outputs=out_features)
        zeros = _awq_unpacked(self._tensor(base, "qzeros", [scales.shape[1], out_features // 8]))
        return _Raw(values.t().contiguous(), scales, zeros.t().contiguous())

    def _packed(self, base: str, shape: list[int]) -> _Raw:
        bits, out_features, in_features = self.format.bits, *shape
        per_word = 32 // bits
        declared = self._tensor(base, "weight_shape", [2]).tolist()
        if declared != shape:
            raise _wrong(f"{base}.weight", f"it is {declared}; config.json asks for {shape}")
        words = self._tensor(base, "weight_packed", [out_features, -(-in_features // per_word)])
        values = _unpacked(words, bits, dim=1)[:, :in_features].contiguous()
        scales = self._scales(base, "weight_scale", transposed=False, outputs=out_features)
        zeros, groups = None, None
        if (name := f"{base}.weight_zero_point") in self._tensors:
            if self._tensors.dtype(name) is torch.int32:
                stored = self._tensor(base, "weight_zero_point", [-(-out_features // per_word), scales.shape[1]])
                zeros = _unpacked(stored, bits, dim=0)[:out_features].contiguous()
            else:
                zeros = self._shifted_zeros(base, list(scales.shape))
        if f"{base}.weight_g_idx" in self._tensors:
            groups = self._tensor(base, "weight_g_idx", [in_features])
            groups = None if bool((groups == -1).all()) else groups
        return _Raw(values, scales, zeros, groups)

    def _plain(self, base: str, shape: list[int]) -> _Raw:
        half = 1 << (self.format.bits - 1)
        stored = self._tensor(base, "weight", shape)
        if self.format.bits == 4 and bool(((stored < -8) | (stored > 7)).any()):
            raise _wrong(f"{base}.weight", "it has values outside -8 to 7")
        values = (stored.to(torch.int16) + half).to(torch.uint8)
        scales = self._scales(base, "weight_scale", transposed=False, outputs=shape[0])
        zeros = None
        if f"{base}.weight_zero_point" in self._tensors:
            zeros = self._shifted_zeros(base, list(scales.shape))
        return _Raw(values, scales, zeros)

    # ---- parts that methods share

    def _tensor(self, base: str, part: str, shape: list[int]) -> torch.Tensor:
        """An integer tensor of exactly this shape."""
        name = f"{base}.{part}"
        file = self._tensors
        if file.shape(name) != shape:
            raise _wrong(name, f"it has shape {file.shape(name)}; config.json asks for {shape}")
        if file.dtype(name) not in (torch.int32, torch.int64, torch.int8):
            raise _wrong(name, f"it is stored as {file.dtype(name)}, not as integers")
        return file.read(name)

    def _scales(self, base: str, part: str, *, transposed: bool, outputs: int) -> torch.Tensor:
        """[out, groups], whichever way they are stored; one scale for all is repeated."""
        name = f"{base}.{part}"
        file = self._tensors
        shape = file.shape(name)
        if not file.dtype(name).is_floating_point:
            raise _wrong(name, f"it is stored as {file.dtype(name)}")
        scales = file.read(name)
        if scales.numel() == 1:
            return scales.reshape(1, 1).expand(outputs, 1)
        scales = scales.unsqueeze(-1) if scales.dim() == 1 and not transposed else scales
        if scales.dim() != 2 or scales.shape[1 if transposed else 0] != outputs:
            raise _wrong(name, f"it has shape {shape}, which does not fit {outputs} outputs")
        return scales.t() if transposed else scales

    def _shifted_zeros(self, base: str, shape: list[int]) -> torch.Tensor:
        """Zero points as signed numbers, one in each int8."""
        name = f"{base}.weight_zero_point"
        file = self._tensors
        if file.dtype(name) is not torch.int8:
            raise _wrong(name, f"it is stored as {file.dtype(name)}")
        zeros = file.read(name)
        if zeros.numel() != 1 and zeros.numel() != shape[0] * shape[1]:
            raise _wrong(name, f"it has shape {file.shape(name)}; its scales are {shape}")
        half = 1 << (self.format.bits - 1)
        shifted = (zeros.to(torch.int16) + half).to(torch.uint8)
        return shifted.reshape(1, 1).expand(shape) if zeros.numel() == 1 else shifted.reshape(shape)

    def _grouping(self, name: str, raw: _Raw, in_features: int) -> tuple[torch.Tensor | None, int]:
        """(order of inputs in which groups lie together or None, inputs of a group)."""
        groups = raw.scales.shape[1]
        if groups < 1 or in_features % groups:
            raise _wrong(name, f"{in_features} inputs do not divide into {groups} groups")
        size = in_features // groups
        if self.format.group_size and groups > 1 and size != self.format.group_size:
            raise _wrong(name, f"it has groups of {size} inputs; config.json says {self.format.group_size}")
        if raw.groups_of_inputs is None:
            return None, size
        found = raw.groups_of_inputs.long()
        within = bool(((found >= 0) & (found < groups)).all())
        if not within or not bool((torch.bincount(found, minlength=groups) == size).all()):
            raise _wrong(name, f"its g_idx does not name {size} inputs for each of {groups} groups")
        order = found.argsort(stable=True)
        in_order = bool((order == torch.arange(in_features)).all())
        return None if in_order else order, size


def _base(name: str) -> str:
    return name.removesuffix(".weight")


def _unpacked(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Values uint8 of int32 words, `32 / bits` times as many along `dim`."""
    per_byte = words.contiguous().view(torch.uint8).view(*words.shape, 4)  # little-endian: the lowest byte first
    if bits == 4:
        per_byte = torch.stack([per_byte & 15, per_byte >> 4], dim=-1).flatten(-2)
    rows, columns, count = per_byte.shape
    if dim == 1:
        return per_byte.reshape(rows, columns * count)
    return per_byte.transpose(1, 2).reshape(rows * count, columns)


def _awq_unpacked(words: torch.Tensor) -> torch.Tensor:
    shuffled = _unpacked(words, 4, dim=1).view(words.shape[0], words.shape[1], 8)
    ordered = torch.empty_like(shuffled)
    ordered[..., list(_AWQ_OUTPUTS)] = shuffled
    return ordered.flatten(1)


def _four_bits(
    name: str, values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int
) -> Int4Weight:
    """Groups that are larger than the usual are split: the same scale, more often."""
    in_features = values.shape[1]
    if group_size % DEFAULT_GROUP == 0 or group_size == in_features:
        pieces = -(-group_size // DEFAULT_GROUP)
        scales = scales.repeat_interleave(pieces, dim=1)
        zeros = zeros.repeat_interleave(pieces, dim=1) if zeros is not None else None
        group_size = min(DEFAULT_GROUP, in_features)
    elif group_size % _GROUP_STEP:
        raise _wrong(name, f"groups of {group_size} inputs are not supported; multiples of {_GROUP_STEP} are")
    return Int4Weight(values, scales, zeros.contiguous() if zeros is not None else None, group_size)


def _eight_bits(raw: _Raw, scales: torch.Tensor, group_size: int) -> Int8Weight:
    """As stored with one scale per output and no zero point; anything else is rounded to that once more."""
    zeros = raw.zeros
    if scales.shape[1] == 1 and (zeros is None or bool((zeros == 128).all())):
        return Int8Weight((raw.values ^ 128).view(torch.int8), scales[:, 0].contiguous())
    offsets = zeros.float() if zeros is not None else torch.full_like(scales, 128)
    exact = raw.values.float() - offsets.repeat_interleave(group_size, dim=1)
    return quantize_int8(exact * scales.repeat_interleave(group_size, dim=1))


def _wrong(name: str, problem: str) -> UsageError:
    return UsageError(
        f"{name}: {problem}.",
        hint="The checkpoint and its config.json do not belong together, or a tool wrote them that is not supported.",
        code="bad_weights",
    )
