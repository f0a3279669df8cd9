"""Attention in plain torch, for any device: what other backends are measured against, and the CPU's fallback.

    cache of a layer: keys and values [num_kv_heads, num_blocks * block_size, head_dim], position p of a request in
    slot block_table[p // block_size] * block_size + p % block_size

Query heads that share a KV head are rows of one product, so K and V are never repeated. Positions beyond a request's
end are never read: what an earlier owner left there cannot leak, not even a NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from powerband.engine.attention.base import AttentionBatch, AttentionShape, HeadNorm, LayerPlaces
from powerband.engine.layers.norm import norm_heads
from powerband.engine.layers.rotary import rotate

# Positions of decodes that are gathered at once: bounds the workspace, unless one context alone is longer.
_GATHERED = 16384
# Lengths of decodes are rounded up to a multiple: oneDNN compiles a product for every shape that it has not yet seen.
_ROUNDING = 32
# Queries that are scored at once where the scores are held in memory (soft cap, sinks).
_QUERY_TILE = 256


@dataclass(slots=True)
class _Decodes:
    """Rows that are computed together: the same number of positions, the shorter ones padded and masked."""

    rows: torch.Tensor | slice
    slots: torch.Tensor  # [rows * length]
    num_rows: int
    length: int
    bias: torch.Tensor | None  # [rows, 1, length]: 0, or -inf on padding


@dataclass(slots=True)
class _Chunk:
    """One row with several new positions: the last of the positions that it may see."""

    tokens: slice
    slots: torch.Tensor | slice | None  # None: nothing cached before it, the chunk is all there is
    mask: torch.Tensor | None  # bool [queries, keys]; None: plainly causal from the first position on


class ReferenceAttention:
    """AttentionBackend in plain torch operators."""

    name = "reference"

    def __init__(self, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        self._cache: list[tuple[torch.Tensor, torch.Tensor]] = []
        # Reused, because memory fresh from the system costs more than copying into it.
        self._workspace = torch.empty(0, device=device)
        self._batch: AttentionBatch | None = None
        self._plans: dict[tuple[int, int | None], tuple[list[_Decodes], list[_Chunk]]] = {}  # by group and window
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
        size = (2, shape.num_kv_heads, num_blocks * self.block_size, shape.head_dim)
        self._cache = []
        for _ in range(num_layers):
            layer = torch.empty(size, dtype=dtype, device=self.device)
            self._cache.append((layer[0], layer[1]))

    def begin(self, batch: AttentionBatch) -> None:
        self._batch = batch
        self._plans = {}

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
        if batch is not self._batch:
            self.begin(batch)
        group, place = self._places.find(layer)
        batch = batch.of_group(group)
        keys, values = self._cache[place]
        keys.index_copy_(1, batch.slots, k.transpose(0, 1))
        values.index_copy_(1, batch.slots, v.transpose(0, 1))
        if (group, shape.window) not in self._plans:
            self._plans[group, shape.window] = self._plan(batch, shape.window)
        decodes, chunks = self._plans[group, shape.window]
        if len(decodes) == 1 and not chunks:
            return _decode(q, *self._gather(keys, values, decodes[0].slots), decodes[0], shape, sinks)
        out = q.new_empty(q.shape)
        for rows in decodes:
            their_keys, their_values = self._gather(keys, values, rows.slots)
            out[rows.rows] = _decode(q[rows.rows], their_keys, their_values, rows, shape, sinks)
        for chunk in chunks:
            if chunk.slots is None:
                chunk_keys, chunk_values = k[chunk.tokens].transpose(0, 1), v[chunk.tokens].transpose(0, 1)
            else:
                chunk_keys, chunk_values = _read(keys, chunk.slots), _read(values, chunk.slots)
            out[chunk.tokens] = _prefill(q[chunk.tokens], chunk_keys, chunk_values, chunk.mask, shape, sinks)
        return out

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
        heads, both = shape.num_heads, shape.num_heads + shape.num_kv_heads
        qk, v = qkv[:, :both], qkv[:, both:]
        if norm is not None:
            qk = norm_heads(qk, norm.weights, norm.eps)
        if rotation is not None:
            qk = rotate(qk, *rotation)
        return self.attend(layer, qk[:, :heads], qk[:, heads:], v, batch, shape, sinks)

    # ---- which positions each row reads

    def _plan(self, batch: AttentionBatch, window: int | None) -> tuple[list[_Decodes], list[_Chunk]]:
        starts, lens = batch.query_starts_host, batch.context_lens_host
        decodes = [self._group(batch, rows, window) for rows in _similar(lens[: batch.num_decodes], window)]
        chunk_rows = range(batch.num_decodes, len(lens))
        chunks = [self._chunk(batch, row, starts[row], starts[row + 1], window) for row in chunk_rows]
        return decodes, chunks

    def _gather(
        self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of these slots, [num_kv_heads, slots, head_dim] each, valid until the next call."""
        size = (2, keys.shape[0], len(slots), keys.shape[2])
        needed = math.prod(size)
        if self._workspace.numel() < needed or self._workspace.dtype != keys.dtype:
            self._workspace = torch.empty(needed + needed // 4, dtype=keys.dtype, device=self.device)
        gathered = self._workspace[:needed].view(size)
        torch.index_select(keys, 1, slots, out=gathered[0])
        torch.index_select(values, 1, slots, out=gathered[1])
        return gathered[0], gathered[1]

    def _run(self, batch: AttentionBatch, row: int, first: int) -> slice | None:
        """Positions [first, end) of a row as a slice of slots, if its blocks are neighbours (CPU: reads tables)."""
        if self.device.type != "cpu":
            return None
        end, size = batch.context_lens_host[row], self.block_size
        blocks = batch.block_tables[row, first // size : (end - 1) // size + 1].numpy()
        if blocks[-1] - blocks[0] != len(blocks) - 1 or (blocks[1:] - blocks[:-1] != 1).any():
            return None
        start = int(blocks[0]) * size + first % size
        return slice(start, start + end - first)

    def _group(self, batch: AttentionBatch, rows: list[int], window: int | None) -> _Decodes:
        ends = [batch.context_lens_host[row] for row in rows]
        firsts = [max(end - window, 0) if window else 0 for end in ends]
        seen = [end - first for end, first in zip(ends, firsts, strict=True)]
        length = -(-max(seen) // _ROUNDING) * _ROUNDING
        row_index = torch.tensor(rows, device=self.device)
        end = torch.tensor(ends, device=self.device).unsqueeze(1)
        positions = torch.tensor(firsts, device=self.device).unsqueeze(1) + torch.arange(length, device=self.device)
        bias = None
        if min(seen) < length:
            bias = torch.zeros(len(rows), 1, length, device=self.device)
            bias.masked_fill_((positions >= end).unsqueeze(1), float("-inf"))
        slots = self._slots(batch.block_tables[row_index], torch.minimum(positions, end - 1)).flatten()
        contiguous = rows[-1] - rows[0] == len(rows) - 1
        where = slice(rows[0], rows[-1] + 1) if contiguous else row_index
        return _Decodes(where, slots, len(rows), length, bias)

    def _chunk(self, batch: AttentionBatch, row: int, start: int, end: int, window: int | None) -> _Chunk:
        context, length = batch.context_lens_host[row], end - start
        first_query = context - length
        first_key = max(first_query - window + 1, 0) if window else 0
        slots: torch.Tensor | slice | None = None
        if first_query > 0:
            slots = self._run(batch, row, first_key)
            if slots is None:
                positions = torch.arange(first_key, context, device=self.device)
                slots = self._slots(batch.block_tables[row].unsqueeze(0), positions.unsqueeze(0)).squeeze(0)
        mask = None
        if first_query > 0 or (window and context > window):
            queries = torch.arange(first_query, context, device=self.device).unsqueeze(1)
            keys = torch.arange(first_key, context, device=self.device)
            mask = keys <= queries
            if window:
                mask &= keys > queries - window
        return _Chunk(slice(start, end), slots, mask)

    def _slots(self, tables: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        blocks = tables.gather(1, positions // self.block_size)
        return blocks.long() * self.block_size + positions % self.block_size


def _similar(lens: list[int], window: int | None) -> list[list[int]]:
    """Rows in groups whose longest sees at most a quarter (and 32 positions) more than their shortest."""
    seen = [min(length, window or length) for length in lens]
    groups: list[list[int]] = []
    for row in sorted(range(len(lens)), key=seen.__getitem__):
        group = groups[-1] if groups else []
        if group and seen[row] <= seen[group[0]] * 1.25 + 32 and seen[row] * (len(group) + 1) <= _GATHERED:
            group.append(row)
        else:
            groups.append([row])
    return [sorted(group) for group in groups]


def _read(cache: torch.Tensor, slots: torch.Tensor | slice) -> torch.Tensor:
    return cache[:, slots] if isinstance(slots, slice) else cache.index_select(1, slots)


def _decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    group: _Decodes,
    shape: AttentionShape,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One query per row: q [rows, num_heads, head_dim]; K and V [num_kv_heads, rows * length, head_dim]."""
    rows, kv_heads = group.num_rows, shape.num_kv_heads
    per_kv = shape.num_heads // kv_heads
    # [kv_heads, rows, queries per kv head, head_dim] against [kv_heads, rows, length, head_dim]
    folded = q.view(rows, kv_heads, per_kv, shape.head_dim).transpose(0, 1)
    k = keys.view(kv_heads, rows, group.length, shape.head_dim)
    v = values.view(kv_heads, rows, group.length, shape.head_dim)
    scores = torch.matmul(folded, k.transpose(-1, -2)).float().mul_(shape.scale)
    if sinks is not None:
        sinks = sinks.view(kv_heads, 1, per_kv, 1)
    weights = _weights(scores, shape.softcap, group.bias, sinks).to(q.dtype)
    return torch.matmul(weights, v).transpose(0, 1).reshape(q.shape)


def _prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    shape: AttentionShape,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Queries [tokens, num_heads, head_dim] over keys [num_kv_heads, keys, head_dim] → like the queries."""
    queries = q.transpose(0, 1)
    if shape.softcap is not None or sinks is not None:
        if mask is None:
            mask = torch.ones(q.shape[0], k.shape[1], dtype=torch.bool, device=q.device).tril_()
        return _scored(queries, k, v, mask, shape, sinks).transpose(0, 1)
    out = F.scaled_dot_product_attention(
        queries.unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=shape.scale,
        enable_gqa=shape.num_heads != shape.num_kv_heads,
    )
    return out.squeeze(0).transpose(0, 1)


def _scored(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    shape: AttentionShape,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention whose scores need more than a mask: q [num_heads, queries, head_dim], a tile of queries at a time."""
    kv_heads = shape.num_kv_heads
    per_kv = shape.num_heads // kv_heads
    if sinks is not None:
        sinks = sinks.view(kv_heads, per_kv, 1, 1)
    folded = q.reshape(kv_heads, per_kv, q.shape[1], shape.head_dim)
    tiles = []
    for start in range(0, q.shape[1], _QUERY_TILE):
        tile = folded[:, :, start : start + _QUERY_TILE]
        scores = torch.matmul(tile, k.unsqueeze(1).transpose(-1, -2)).float().mul_(shape.scale)
        bias = torch.zeros(tile.shape[2], k.shape[1], device=q.device)
        bias.masked_fill_(~mask[start : start + _QUERY_TILE], float("-inf"))
        weights = _weights(scores, shape.softcap, bias, sinks).to(q.dtype)
        tiles.append(torch.matmul(weights, v.unsqueeze(1)))
    return torch.cat(tiles, dim=2).view(q.shape)


def _weights(
    scores: torch.Tensor, softcap: float | None, bias: torch.Tensor | None, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Softmax over the last dimension of scaled float32 scores. A sink takes its share and gives nothing."""
    if softcap is not None:
        scores = (scores / softcap).tanh_().mul_(softcap)
    if bias is not None:
        scores = scores + bias
    if sinks is None:
        return scores.softmax(dim=-1)
    column = sinks.float().expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
