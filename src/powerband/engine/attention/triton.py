"""Attention by Triton kernels: for CUDA and ROCm devices, and for tests under Triton's interpreter.

    cache of a layer: keys and values [num_blocks, num_kv_heads, block_size, head_dim]

A KV head's positions of one block lie together, so that a program reads whole runs of memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
import triton

from powerband.engine.attention.base import AttentionBatch, AttentionShape, HeadNorm, LayerPlaces
from powerband.engine.kernels.paged_attention import chunk_kernel, combine_kernel, decode_kernel
from powerband.engine.kernels.rotary_store import rotary_store_kernel

_LOG2_E = 1.0 / math.log(2.0)
_MAX_SPLITS = 64
# Programs of the decode kernel per multiprocessor that are enough to keep memory busy.
_PROGRAMS_PER_PROCESSOR = 4


class TritonAttention:
    """AttentionBackend by Triton kernels."""

    name = "triton"

    def __init__(self, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        self._interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        on_device = device.type == "cuda"
        self._num_processors = torch.cuda.get_device_properties(device).multi_processor_count if on_device else 1
        self._cache: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._places = LayerPlaces()

    def allocate(
        self,
        num_layers: int,
        num_blocks: int,
        shape: AttentionShape,
        dtype: torch.dtype,
        places: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._places = LayerPlaces(places)
        size = (2, num_blocks, shape.num_kv_heads, self.block_size, shape.head_dim)
        layers = [torch.zeros(size, dtype=dtype, device=self.device) for _ in range(num_layers)]
        self._cache = [(layer[0], layer[1]) for layer in layers]

    def begin(self, batch: AttentionBatch) -> None:
        """Nothing to prepare: the kernels read the batch on the device."""

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
        group, place = self._places.find(layer)
        batch = batch.of_group(group)
        self._store(place, q, k, v, batch, shape, q_out=None, rotation=None, norm=None)
        return self._attend(place, q, batch, shape, sinks)

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
        """`attend` straight from the projection: norm of each head, rotation and KV write in one kernel.

        qkv: [tokens, num_heads + 2 * num_kv_heads, head_dim]. rotation: cos and (signed) sin [tokens, 1, rotary_dim].
        """
        group, place = self._places.find(layer)
        batch = batch.of_group(group)
        heads, kv_heads = shape.num_heads, shape.num_kv_heads
        q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
        if rotation is not None or norm is not None:
            q_out = torch.empty((qkv.shape[0], heads, shape.head_dim), dtype=qkv.dtype, device=qkv.device)
            self._store(place, q, k, v, batch, shape, q_out=q_out, rotation=rotation, norm=norm)
            q = q_out
        else:
            self._store(place, q, k, v, batch, shape, q_out=None, rotation=None, norm=None)
        return self._attend(place, q, batch, shape, sinks)

    # ---- the kernels' arguments

    def _store(
        self,
        place: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: AttentionBatch,
        shape: AttentionShape,
        *,
        q_out: torch.Tensor | None,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
        norm: HeadNorm | None,
    ) -> None:
        keys, values = self._cache[place]
        tile_q = min(triton.next_power_of_2(shape.num_heads), 16)
        q_tiles = triton.cdiv(shape.num_heads, tile_q) if q_out is not None else 0
        q_out = q if q_out is None else q_out
        cos, sin = rotation if rotation is not None else (q, q)
        weights, eps = (norm.weights, norm.eps) if norm is not None else (q, 0.0)
        strides = (q.stride(0), k.stride(0), v.stride(0), q_out.stride(0), keys.stride(0), keys.stride(1))
        rotary_store_kernel[(q.shape[0], q_tiles + 1)](
            *(q, k, v, q_out, keys, values, batch.slots, cos, sin, weights, eps),
            *strides,
            NUM_HEADS=shape.num_heads,
            NUM_KV_HEADS=shape.num_kv_heads,
            TILE_Q=tile_q,
            TILE_KV=triton.next_power_of_2(shape.num_kv_heads),
            Q_TILES=q_tiles,
            BLOCK_SIZE=self.block_size,
            HEAD_DIM=shape.head_dim,
            PAD_DIM=triton.next_power_of_2(shape.head_dim),
            ROTARY_DIM=cos.shape[-1] if rotation is not None else 0,
            HAS_NORM=norm is not None,
            num_warps=4,
        )

    def _attend(
        self, place: int, q: torch.Tensor, batch: AttentionBatch, shape: AttentionShape, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        num_rows = len(batch.context_lens_host)
        if batch.num_decodes:
            self._decode(place, q, out, batch, shape, sinks)
        if batch.num_decodes < num_rows:
            self._chunks(place, q, out, batch, shape, sinks)
        return out

    def _decode(
        self,
        place: int,
        q: torch.Tensor,
        out: torch.Tensor,
        batch: AttentionBatch,
        shape: AttentionShape,
        sinks: torch.Tensor | None,
    ) -> None:
        keys, values = self._cache[place]
        rows, heads = batch.num_decodes, shape.num_heads
        group = heads // shape.num_kv_heads
        splits = self._num_splits(batch, shape, q.dtype)
        partial = partial_lse = out
        if splits > 1:
            partial = torch.empty((rows, heads, splits, shape.head_dim), dtype=torch.float32, device=q.device)
            partial_lse = torch.empty((rows, heads, splits), dtype=torch.float32, device=q.device)
        constants = self._constants(shape, q.dtype, sinks)
        decode_kernel[(rows, shape.num_kv_heads, splits)](
            *(q, out, partial, partial_lse, keys, values, batch.block_tables, batch.context_lens),
            *(q if sinks is None else sinks, *_scales(shape)),
            *_strides(q, out, batch, keys),
            *(heads, splits),
            GROUP=group,
            TILE_M=max(triton.next_power_of_2(group), 16),
            TILE_N=_decode_tile(_pad(shape.head_dim), q.dtype),
            SINGLE=splits == 1,
            **constants,
            num_warps=4,
            num_stages=2 if q.dtype == torch.float32 else 3,
        )
        if splits > 1:
            combine_kernel[(rows, heads)](
                *(partial, partial_lse, out, q if sinks is None else sinks, out.stride(0), out.stride(1), splits),
                MAX_SPLITS=_MAX_SPLITS,
                HEAD_DIM=shape.head_dim,
                PAD_DIM=_pad(shape.head_dim),
                HAS_SINKS=sinks is not None,
                num_warps=4,
            )

    def _chunks(
        self,
        place: int,
        q: torch.Tensor,
        out: torch.Tensor,
        batch: AttentionBatch,
        shape: AttentionShape,
        sinks: torch.Tensor | None,
    ) -> None:
        keys, values = self._cache[place]
        first = batch.num_decodes
        num_rows = len(batch.context_lens_host) - first
        num_tokens = batch.query_starts_host[-1] - batch.query_starts_host[first]
        group = shape.num_heads // shape.num_kv_heads
        tile_m, tile_n = _chunk_tiles(_pad(shape.head_dim), q.dtype, num_tokens // num_rows)
        tile_m = max(tile_m, triton.next_power_of_2(group))
        queries = tile_m // group
        chunk_kernel[(num_tokens // queries + num_rows, shape.num_kv_heads)](
            *(q, out, keys, values, batch.block_tables, batch.query_starts, batch.context_lens),
            *(q if sinks is None else sinks, first, num_rows, *_scales(shape)),
            *_strides(q, out, batch, keys),
            GROUP=group,
            QUERIES=queries,
            TILE_M=tile_m,
            TILE_N=tile_n,
            **self._constants(shape, q.dtype, sinks),
            num_warps=8 if tile_m >= 128 else 4,
            num_stages=1 if q.dtype == torch.float32 else 2,
        )

    def _constants(self, shape: AttentionShape, dtype: torch.dtype, sinks: torch.Tensor | None) -> dict[str, int]:
        """What both attention kernels are compiled for."""
        return {
            "BLOCK_SIZE": self.block_size,
            "HEAD_DIM": shape.head_dim,
            "PAD_DIM": _pad(shape.head_dim),
            "WINDOW": shape.window or 0,
            "HAS_SOFTCAP": shape.softcap is not None,
            "HAS_SINKS": sinks is not None,
            "UPCAST": self._interpreted or dtype == torch.float32,
        }

    def _num_splits(self, batch: AttentionBatch, shape: AttentionShape, dtype: torch.dtype) -> int:
        """Runs per context, a power of two: enough programs for the device, none of them without a tile."""
        max_context = max(batch.context_lens_host[: batch.num_decodes])
        tile = _decode_tile(_pad(shape.head_dim), dtype)
        wanted = self._num_processors * _PROGRAMS_PER_PROCESSOR / (batch.num_decodes * shape.num_kv_heads)
        useful = triton.cdiv(min(max_context, shape.window or max_context), tile)
        return 1 << max(0, int(math.log2(max(1.0, min(wanted, useful, _MAX_SPLITS)))))


def _pad(head_dim: int) -> int:
    """The width of a tile: a power of two, and at least what a matrix product takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _strides(q: torch.Tensor, out: torch.Tensor, batch: AttentionBatch, keys: torch.Tensor) -> tuple[int, ...]:
    table = batch.block_tables.stride(0)
    return q.stride(0), q.stride(1), out.stride(0), out.stride(1), table, keys.stride(0), keys.stride(1)


def _decode_tile(pad_dim: int, dtype: torch.dtype) -> int:
    """Positions per tile: 16 KiB of keys."""
    return max(16, min(128, 16384 // (pad_dim * dtype.itemsize)))


def _chunk_tiles(pad_dim: int, dtype: torch.dtype, tokens_per_row: int) -> tuple[int, int]:
    """Rows (queries times heads) and positions per tile, so that tiles fit into 96 KiB and a thread's registers."""
    if dtype == torch.float32:
        return 32, 16 if pad_dim > 128 else 32
    if pad_dim > 128:
        return 64, 32
    return (64 if tokens_per_row < 64 else 128), 64


def _scales(shape: AttentionShape) -> tuple[float, float]:
    """Factors that bring logits to base 2, see `_scores` of the kernels."""
    if shape.softcap is None:
        return shape.scale * _LOG2_E, 0.0
    return shape.scale / shape.softcap, shape.softcap * _LOG2_E
