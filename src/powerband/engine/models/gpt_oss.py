"""gpt-oss: attention sinks, and experts stored together, gate and up interleaved; plain or as MXFP4.

MXFP4 (OCP Microscaling Formats 1.0): 32 values of 4 bits (e2m1) share one power of two (e8m0). Two values a byte, the
first in the low half. It is expanded while loading.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from powerband.engine.layers.experts import Experts
from powerband.engine.models.decoder import Decoder
from powerband.engine.models.llama import NAMES
from powerband.engine.models.weight_mapping import WeightSlot, layers_of, plain_slots

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_E8M0_BIAS = 127


def slots(model: Decoder, names: Collection[str]) -> Iterator[WeightSlot]:
    yield from plain_slots(model, NAMES)
    for index, layer in enumerate(layers_of(model)):
        if isinstance(layer.mlp, Experts):
            yield from _expert_slots(layer.mlp, f"model.layers.{index}.mlp.", names)


def _expert_slots(experts: Experts, base: str, names: Collection[str]) -> Iterator[WeightSlot]:
    yield WeightSlot((f"{base}router.weight",), experts.router.weight)
    if experts.router.bias is not None:
        yield WeightSlot((f"{base}router.bias",), experts.router.bias)
    gate_up, down = f"{base}experts.gate_up_proj", f"{base}experts.down_proj"
    interleaved = _interleaved(experts.gate_up)
    if f"{gate_up}_blocks" in names:
        yield WeightSlot(
            (f"{gate_up}_blocks", f"{gate_up}_scales"),
            interleaved,
            lambda blocks, scales: _in_pairs(expand_mxfp4(blocks, scales, experts.gate_up.dtype)),
        )
        yield WeightSlot(
            (f"{down}_blocks", f"{down}_scales"),
            experts.down,
            lambda blocks, scales: expand_mxfp4(blocks, scales, experts.down.dtype),
        )
    else:
        yield WeightSlot((gate_up,), interleaved, lambda stored: _in_pairs(stored.transpose(1, 2)))
        yield WeightSlot((down,), experts.down, lambda stored: stored.transpose(1, 2))
    if experts.gate_up_bias is not None and experts.down_bias is not None:
        yield WeightSlot((f"{gate_up}_bias",), _interleaved(experts.gate_up_bias), _in_pairs)
        yield WeightSlot((f"{down}_bias",), experts.down_bias)


def _interleaved(gate_up: torch.Tensor) -> torch.Tensor:
    """[experts, gate rows then up rows, …] seen as [experts, pairs, gate or up, …]."""
    experts, rows = gate_up.shape[:2]
    return gate_up.view(experts, 2, rows // 2, *gate_up.shape[2:]).transpose(1, 2)


def _in_pairs(stored: torch.Tensor) -> torch.Tensor:
    """[experts, interleaved rows, …] seen as [experts, pairs, gate or up, …]."""
    experts, rows = stored.shape[:2]
    return stored.reshape(experts, rows // 2, 2, *stored.shape[2:])


def expand_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """blocks uint8 [experts, rows, groups, 16], scales uint8 [experts, rows, groups] → [experts, rows, groups * 32]."""
    values = torch.tensor(_E2M1, dtype=dtype)
    out = torch.empty(*blocks.shape[:3], 32, dtype=dtype)
    for expert in range(blocks.shape[0]):  # one at a time: the indices are eight times as large as the blocks
        exponents = (scales[expert].to(torch.int32) - _E8M0_BIAS).unsqueeze(-1)
        low, high = blocks[expert] & 15, blocks[expert] >> 4
        pairs = torch.stack([values[low.int()], values[high.int()]], dim=-1).flatten(-2)
        torch.ldexp(pairs, exponents, out=out[expert])
    return out.flatten(2)
