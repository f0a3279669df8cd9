"""The halves of decoder layers as one operator each (csrc/blocks.cpp), where they are made of the kernels' parts."""

from __future__ import annotations

import torch

from powerband.engine.attention.base import AttentionBackend, AttentionBatch
from powerband.engine.attention.cpu import CpuAttention
from powerband.engine.kernels.cpu.layers import ACTIVATIONS
from powerband.engine.layers.mlp import GatedMLP
from powerband.engine.layers.norm import RMSNorm
from powerband.engine.models.decoder import Attention, Decoder, DecoderLayer, Rotation
from powerband.errors import UsageError
from powerband.spec.model import RopeSpec


def use_cpu_blocks(model: Decoder) -> None:
    """Let each half of a layer be one operator where that can be. Needs `CpuAttention`, and weights that are packed.

    What stays: experts, norms over all heads of q or k together, and projections that something else computes.
    """
    if model.embedding.weight.dtype is not torch.bfloat16:
        return
    for layer in model.layers:
        if not isinstance(layer, DecoderLayer):
            continue
        attention, mlp = layer.attention, layer.mlp
        qkv, output = attention.qkv.packed_operands(), attention.output.packed_operands()
        if qkv is not None and output is not None and attention.q_norm is None:
            norms = _norms(attention.eps, layer.attention_norm, layer.attention_post_norm)
            layer.attention_block = CpuAttentionBlock(attention, (*norms, *qkv, *output))
        if not isinstance(mlp, GatedMLP):
            continue
        gate_up, down = mlp.gate_up.packed_operands(), mlp.down.packed_operands()
        if gate_up is not None and down is not None:
            norms = _norms(attention.eps, layer.mlp_norm, layer.mlp_post_norm)
            size = mlp.intermediate_size
            layer.mlp_block = CpuMLPBlock((*norms, *gate_up, *down, size, ACTIVATIONS.index(mlp.activation)))


def _norms(
    eps: float, norm: RMSNorm | None, post_norm: RMSNorm | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
    return (norm.weight if norm is not None else None, post_norm.weight if post_norm is not None else None, eps)


class CpuAttentionBlock:
    def __init__(self, module: Attention, operands: tuple[object, ...]) -> None:
        """operands: norms, eps, projections, in the operator's order."""
        self._index = module.index
        self._rope = module.rope
        self._shape = module.shape
        self._sinks = module.sinks
        self._head_norm = module.head_norm
        self._operands = operands

    def __call__(
        self,
        hidden: torch.Tensor,
        rotations: dict[RopeSpec, Rotation],
        batch: AttentionBatch,
        attention: AttentionBackend,
    ) -> None:
        """hidden += attention of it. Raises UsageError for another backend than CpuAttention."""
        if not isinstance(attention, CpuAttention):
            raise UsageError(f"A layer's attention in one operator needs the 'cpu' backend, not '{attention.name}'.")
        cos, sin = rotations[self._rope] if self._rope is not None else (None, None)
        cached = attention.operands(self._index, batch, self._shape, self._sinks)
        torch.ops.powerband.attention_block(hidden, *self._operands, cos, sin, self._head_norm, *cached)


class CpuMLPBlock:
    def __init__(self, operands: tuple[object, ...]) -> None:
        self._operands = operands

    def __call__(self, hidden: torch.Tensor) -> None:
        """hidden += MLP of it."""
        torch.ops.powerband.mlp_block(hidden, *self._operands)
