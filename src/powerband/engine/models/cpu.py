"""Decoder layers computed by C++ kernels (csrc/blocks.cpp), half a layer each: a whole model is one operator."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

from powerband.engine.attention.base import AttentionBackend, AttentionBatch
from powerband.engine.attention.cpu import CpuAttention, shape_operands
from powerband.engine.layers.cpu import ACTIVATIONS
from powerband.engine.layers.mlp import GatedMLP
from powerband.engine.layers.norm import RMSNorm
from powerband.engine.models.decoder import Decoder, DecoderLayer, Rotation
from powerband.spec.model.model_spec import RopeSpec

Half = Callable[[torch.Tensor, dict[RopeSpec, Rotation], AttentionBatch, AttentionBackend], None]


def use_cpu_blocks(model: Decoder, attention: CpuAttention) -> None:
    """Run the model's layers as blocks. Needs weights that are packed, and attention that has its cache.

    What stays in Python: experts, norms over all heads together, and projections that something else computes.
    """
    if model.embedding.weight.dtype is torch.bfloat16:
        model.run_layers = CpuLayers(model, attention)


class CpuLayers:
    """RunLayers. Halves that the kernels can compute are blocks, and those in a row one call."""

    def __init__(self, model: Decoder, attention: CpuAttention) -> None:
        self.num_blocks = 0
        self._adapters = model.adapters
        self._projections: dict[int, tuple[str, str]] = {}  # names of a block's first and second
        self._parts: list[list[int] | Half] = []
        self._made: list[int] = []
        weakref.finalize(self, torch.ops.powerband.free_blocks, self._made)
        ropes = list(model.rotary)
        for index, layer in enumerate(model.layers):
            if isinstance(layer, DecoderLayer):
                name = f"layers.{index}"
                names = f"{name}.attention.qkv", f"{name}.attention.output"
                self._append(_attention_block(layer, attention, ropes), names, layer.attend)
                names = f"{name}.mlp.gate_up", f"{name}.mlp.down"
                self._append(_mlp_block(layer), names, lambda hidden, *_, own=layer: own.transform(hidden))

    def _append(self, block: int | None, projections: tuple[str, str], otherwise: Half) -> None:
        if block is None:
            self._parts.append(otherwise)
            return
        self._projections[block] = projections
        self.num_blocks += 1
        self._made.append(block)
        if self._parts and isinstance(self._parts[-1], list):
            self._parts[-1].append(block)
        else:
            self._parts.append([block])

    def __call__(
        self,
        hidden: torch.Tensor,
        rotations: dict[RopeSpec, Rotation],
        batch: AttentionBatch,
        attention: AttentionBackend,
    ) -> None:
        cos, sin = [cos for cos, _ in rotations.values()], [sin for _, sin in rotations.values()]
        groups = (batch, *batch.others)
        slots, tables = [one.slots for one in groups], [one.block_tables for one in groups]
        step = (slots, batch.query_starts, batch.context_lens, tables, batch.num_decodes)
        starts, ends = self._adapters.bounds()
        for part in self._parts:
            if isinstance(part, list):
                deltas = self._deltas(part) if starts else []
                torch.ops.powerband.run_blocks(part, hidden, cos, sin, *step, deltas, starts, ends)
            else:
                part(hidden, rotations, batch, attention)

    def _deltas(self, blocks: list[int]) -> list[int]:
        """[blocks, 2, groups of rows]: what the step's adapters add."""
        names = (name for block in blocks for name in self._projections[block])
        return [number for name in names for number in self._adapters.kernel_deltas(name)]


def _attention_block(layer: DecoderLayer, attention: CpuAttention, ropes: list[RopeSpec]) -> int | None:
    module = layer.attention
    qkv, output = module.qkv.packed_operands(), module.output.packed_operands()
    if qkv is None or output is None or module.q_norm is not None:
        return None
    group, place = attention.places.find(module.index)
    block: int = torch.ops.powerband.attention_block(
        *_norms(module.eps, layer.attention_norm, layer.attention_post_norm),
        *qkv,
        *output,
        -1 if module.rope is None else ropes.index(module.rope),
        module.head_norm,
        attention.cache[place],
        group,
        *shape_operands(module.shape),
        module.sinks,
    )
    return block


def _mlp_block(layer: DecoderLayer) -> int | None:
    mlp = layer.mlp
    if not isinstance(mlp, GatedMLP):
        return None
    gate_up, down = mlp.gate_up.packed_operands(), mlp.down.packed_operands()
    if gate_up is None or down is None:
        return None
    norms = _norms(layer.attention.eps, layer.mlp_norm, layer.mlp_post_norm)
    activation = ACTIVATIONS.index(mlp.activation)
    block: int = torch.ops.powerband.mlp_block(*norms, *gate_up, *down, mlp.intermediate_size, activation)
    return block


def _norms(
    eps: float, norm: RMSNorm | None, post_norm: RMSNorm | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
    return (norm.weight if norm is not None else None, post_norm.weight if post_norm is not None else None, eps)
