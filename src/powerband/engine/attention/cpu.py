"""Attention by our C++ kernels, for CPUs and bfloat16: each layer's is one operator (kernels/cpu/csrc/attention.cpp).

    cache of a layer: [num_blocks, num_kv_heads, 64 * head_dim], a KV head's part of a block as in csrc/kv_layout.h
    in int8:          [num_blocks, num_kv_heads, 64 * (head_dim + 4)], each key and value with a scale in float32

That part is what dot products of bfloat16 and matrix tiles take as it lies, so nothing is rearranged to read it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from powerband.engine.attention.base import AttentionBatch, AttentionShape, HeadNorm, LayerPlaces
from powerband.engine.huge_pages import huge_empty
from powerband.engine.kernels.cpu.library import Status as KernelStatus

BLOCK_SIZE = 32
_MAX_HEAD_DIM = 256
_SCALE_BYTES = torch.float32.itemsize


def missing_requirement(kernels: KernelStatus, dtype: torch.dtype, block_size: int, head_dim: int) -> str | None:
    """Why the kernels cannot serve such a model here; None: they can."""
    if kernels.tier is None:
        return f"no CPU kernels: {kernels.reason}"
    if dtype is not torch.bfloat16:
        return f"the CPU kernels compute in bfloat16, not {str(dtype).removeprefix('torch.')}"
    if block_size != BLOCK_SIZE:
        return f"the CPU kernels need blocks of {BLOCK_SIZE} tokens, not {block_size}"
    if head_dim % 32 or head_dim > _MAX_HEAD_DIM:
        return f"the CPU kernels need a head_dim that is a multiple of 32, at most {_MAX_HEAD_DIM}, not {head_dim}"
    return None


class CpuAttention:
    """AttentionBackend by C++ kernels. Whatever comes from a request is checked by the operator: RuntimeError."""

    name = "cpu"

    def __init__(self) -> None:
        self.cache: list[torch.Tensor] = []  # see the module's drawing
        self.places = LayerPlaces()

    def allocate(
        self,
        num_layers: int,
        num_blocks: int,
        shape: AttentionShape,
        dtype: torch.dtype,
        places: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.places = LayerPlaces(places)
        per_position = shape.head_dim + _SCALE_BYTES if dtype == torch.int8 else shape.head_dim
        size = (num_layers, num_blocks, shape.num_kv_heads, 2 * BLOCK_SIZE * per_position)
        self.cache = list(huge_empty(size, dtype).unbind(0))

    def begin(self, batch: AttentionBatch) -> None:
        """Nothing to prepare: the operator reads the batch."""

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: AttentionBatch,
        shape: AttentionShape,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.attend_unrotated(layer, torch.cat([q, k, v], dim=1), None, None, batch, shape, sinks)

    def attend_unrotated(
        self,
        layer: int,
        qkv: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
        norm: HeadNorm | None,
        batch: AttentionBatch,
        shape: AttentionShape,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As in AttentionBackend. q and k are turned where they lie: `qkv` is used up."""
        cos, sin = rotation if rotation is not None else (None, None)
        group, place = self.places.find(layer)
        batch = batch.of_group(group)
        out: torch.Tensor = torch.ops.powerband.attend(
            qkv.flatten(1),
            cos,
            sin,
            norm.weights if norm is not None else None,
            norm.eps if norm is not None else 0.0,
            self.cache[place],
            batch.slots,
            batch.query_starts,
            batch.context_lens,
            batch.block_tables,
            batch.num_decodes,
            *shape_operands(shape),
            sinks,
        )
        return out.view(-1, shape.num_heads, shape.head_dim)


def shape_operands(shape: AttentionShape) -> tuple[int, int, float, int, float]:
    """What the operators take of it: heads, KV heads, scale, window and soft cap (0: none)."""
    return shape.num_heads, shape.num_kv_heads, shape.scale, shape.window or 0, shape.softcap or 0.0
