"""Requests with known queries, keys and values, and what attention over them is, written out in float64.

With an int8 cache the expected result is that of the keys and values as they are after quantization.
"""

from __future__ import annotations

from itertools import product

import torch

from powerband.engine.attention.base import AttentionBatch, AttentionShape
from powerband.engine.attention.cpu import CpuAttention

BLOCK = 32
Rotation = tuple[torch.Tensor, torch.Tensor]


def oracle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: AttentionShape, sinks: torch.Tensor | None
) -> torch.Tensor:
    """q [new, heads, dim] are the last positions of k, v [context, kv_heads, dim]. float64, one head at a time."""
    new, context = len(q), len(k)
    out = torch.zeros(q.shape, dtype=torch.float64)
    for head, i in product(range(shape.num_heads), range(new)):
        kv = head // (shape.num_heads // shape.num_kv_heads)
        position = context - new + i
        first = max(0, position - shape.window + 1) if shape.window else 0
        scores = k[first : position + 1, kv].double() @ q[i, head].double() * shape.scale
        if shape.softcap:
            scores = torch.tanh(scores / shape.softcap) * shape.softcap
        if sinks is not None:
            scores = torch.cat([scores, sinks[head : head + 1].double()])
        weights = scores.softmax(0)[: position + 1 - first]
        out[i, head] = weights @ v[first : position + 1, kv].double()
    return out


class World:
    """Requests whose keys and values lie in shuffled blocks, but for those of the newest tokens.

    works: (context length after the step, new tokens), decodes first. What nobody owns is not a number.
    """

    def __init__(
        self, works: list[tuple[int, int]], shape: AttentionShape, *, seed: int = 1, int8: bool = False
    ) -> None:
        self.int8 = int8
        generator = torch.Generator().manual_seed(seed)
        self.works, self.shape = works, shape
        sizes = [-(-context // BLOCK) for context, _ in works]
        self.num_blocks = sum(sizes) + 2
        tables = torch.split(torch.randperm(self.num_blocks, generator=generator), [*sizes, 2])[:-1]
        width = max(sizes, default=1)
        self.tables = torch.zeros(len(works), width, dtype=torch.int32)
        for row, table in enumerate(tables):
            self.tables[row, : len(table)] = table

        def random(count: int, heads: int) -> torch.Tensor:
            return torch.randn(count, heads, shape.head_dim, generator=generator).bfloat16()

        self.queries = [random(new, shape.num_heads) for _, new in works]
        self.keys = [random(context, shape.num_kv_heads) for context, _ in works]
        self.values = [random(context, shape.num_kv_heads) for context, _ in works]

    def slots(self, row: int, start: int, end: int) -> torch.Tensor:
        positions = torch.arange(start, end)
        return self.tables[row, positions // BLOCK].long() * BLOCK + positions % BLOCK

    def batch(self) -> AttentionBatch:
        counts, contexts = [new for _, new in self.works], [context for context, _ in self.works]
        starts = torch.tensor([0, *counts]).cumsum(0)
        slots = [self.slots(row, context - new, context) for row, (context, new) in enumerate(self.works)]
        return AttentionBatch(
            query_starts=starts.int(),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            block_tables=self.tables,
            slots=torch.cat([torch.zeros(0, dtype=torch.int64), *slots]),
            num_decodes=sum(new == 1 for new in counts),
            query_starts_host=starts.tolist(),
            context_lens_host=contexts,
        )

    def backend(self) -> CpuAttention:
        """With everything in its cache that was there before the step."""
        backend = CpuAttention()
        backend.allocate(1, self.num_blocks, self.shape, torch.int8 if self.int8 else torch.bfloat16)
        cache = backend.cache[0]
        cache.view(torch.int8).fill_(-1)  # a NaN, as bfloat16 and as float32
        for row, (context, new) in enumerate(self.works):
            before = context - new
            keys, values = self.keys[row][:before], self.values[row][:before]
            (store_int8 if self.int8 else store)(cache, self.slots(row, 0, before), keys, values)
        return backend

    def qkv(self) -> torch.Tensor:
        """[tokens, heads + 2 * KV heads, head_dim] of the newest tokens."""
        rows = [
            torch.cat([q, k[len(k) - len(q) :], v[len(v) - len(q) :]], dim=1)
            for q, k, v in zip(self.queries, self.keys, self.values, strict=True)
        ]
        empty = torch.zeros(0, self.shape.num_heads + 2 * self.shape.num_kv_heads, self.shape.head_dim).bfloat16()
        return torch.cat([empty, *rows])

    def attend(self, sinks: torch.Tensor | None = None) -> torch.Tensor:
        return self.backend().attend_unrotated(0, self.qkv(), None, None, self.batch(), self.shape, sinks)

    def expected(self, sinks: torch.Tensor | None = None) -> torch.Tensor:
        held = [[dequantized(t) if self.int8 else t for t in tensors] for tensors in (self.keys, self.values)]
        rows = zip(self.queries, *held, strict=True)
        return torch.cat([oracle(q, k, v, self.shape, sinks) for q, k, v in rows])


def store(cache: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """keys, values [tokens, KV heads, head_dim] to where csrc/kv_layout.h says they lie."""
    size = keys.shape[-1]
    k = cache[:, :, : BLOCK * size].view(*cache.shape[:2], size // 2, BLOCK, 2)
    v = cache[:, :, BLOCK * size :].view(*cache.shape[:2], BLOCK // 2, size, 2)
    for slot, key, value in zip(slots.tolist(), keys, values, strict=True):
        block, offset = divmod(slot, BLOCK)
        k[block, :, :, offset] = key.unflatten(-1, (size // 2, 2))
        v[block, :, offset // 2, :, offset % 2] = value


def quantized(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """rows [..., size] → int8 numbers, and what they are multiples of [..., 1] float32."""
    scales = rows.float().abs().amax(-1, keepdim=True) / 127
    return (rows.float() / scales.where(scales > 0, 1)).round().to(torch.int8), scales


def dequantized(rows: torch.Tensor) -> torch.Tensor:
    numbers, scales = quantized(rows)
    return numbers * scales


def store_int8(cache: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """As `store`, to a cache in int8."""
    size = keys.shape[-1]
    (key_numbers, key_scales), (value_numbers, value_scales) = quantized(keys), quantized(values)
    store(cache[:, :, : 2 * BLOCK * size], slots, key_numbers, value_numbers)
    scales = cache[:, :, 2 * BLOCK * size :].view(torch.float32)
    scales[slots // BLOCK, :, slots % BLOCK] = key_scales[..., 0]
    scales[slots // BLOCK, :, BLOCK + slots % BLOCK] = value_scales[..., 0]


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    """To the rounding of weights and results to bfloat16."""
    torch.testing.assert_close(out.double(), expected, atol=1.5e-2, rtol=1.5e-2)
