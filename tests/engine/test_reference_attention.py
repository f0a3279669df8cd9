"""The reference attention against attention written out in float64, over mixes of decodes and chunks."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from powerband.engine.attention.base import AttentionBatch, AttentionShape
from powerband.engine.attention.reference import ReferenceAttention

BLOCK_SIZE = 8
NUM_BLOCKS = 96
HEAD_DIM = 16
CPU = torch.device("cpu")


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
    """Requests with known keys and values, of which the backend has all but the newest in its blocks."""

    def __init__(self, works: list[tuple[int, int]], shape: AttentionShape, *, scattered: bool) -> None:
        """works: (context length after the step, new tokens), decodes first."""
        generator = torch.Generator().manual_seed(1)
        self.works, self.shape = works, shape
        order = torch.randperm(NUM_BLOCKS, generator=generator) if scattered else torch.arange(NUM_BLOCKS)
        self.backend = ReferenceAttention(BLOCK_SIZE, CPU)
        self.backend.allocate(1, NUM_BLOCKS, shape, torch.float32)
        for cache in self.backend._cache[0]:
            cache.fill_(float("nan"))  # what others left there must never be read
        kv_shape = (shape.num_kv_heads, shape.head_dim)
        self.keys = [torch.randn(context, *kv_shape, generator=generator) for context, _ in works]
        self.values = [torch.randn(context, *kv_shape, generator=generator) for context, _ in works]
        self.queries = [torch.randn(new, shape.num_heads, shape.head_dim, generator=generator) for _, new in works]
        taken = 0
        tables = []
        for context, _ in works:
            needed = -(-context // BLOCK_SIZE)
            tables.append(order[taken : taken + needed])
            taken += needed
        width = max(map(len, tables))
        self.tables = torch.stack([torch.nn.functional.pad(table, (0, width - len(table))) for table in tables]).int()

    def slots(self, row: int, start: int, end: int) -> torch.Tensor:
        positions = torch.arange(start, end)
        return self.tables[row, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE

    def attend(self, sinks: torch.Tensor | None) -> torch.Tensor:
        for row, (context, new) in enumerate(self.works):
            before = self.slots(row, 0, context - new)
            self.backend._cache[0][0][:, before] = self.keys[row][: context - new].transpose(0, 1)
            self.backend._cache[0][1][:, before] = self.values[row][: context - new].transpose(0, 1)
        counts = [new for _, new in self.works]
        starts = torch.tensor([0, *counts]).cumsum(0)
        contexts = [context for context, _ in self.works]
        batch = AttentionBatch(
            query_starts=starts.int(),
            context_lens=torch.tensor(contexts).int(),
            block_tables=self.tables,
            slots=torch.cat([self.slots(row, c - n, c) for row, (c, n) in enumerate(self.works)]),
            num_decodes=sum(count == 1 for count in counts),
            query_starts_host=starts.tolist(),
            context_lens_host=contexts,
        )
        self.backend.begin(batch)
        new_keys = torch.cat([keys[c - n :] for keys, (c, n) in zip(self.keys, self.works, strict=True)])
        new_values = torch.cat([values[c - n :] for values, (c, n) in zip(self.values, self.works, strict=True)])
        return self.backend.attend(0, torch.cat(self.queries), new_keys, new_values, batch, self.shape, sinks)

    def expected(self, sinks: torch.Tensor | None) -> torch.Tensor:
        rows = zip(self.queries, self.keys, self.values, strict=True)
        return torch.cat([oracle(q, k, v, self.shape, sinks) for q, k, v in rows])


MIXES = {
    "one_decode": [(19, 1)],
    "first_token": [(1, 1)],
    "decodes_of_like_length": [(40, 1), (38, 1), (41, 1)],
    "decodes_of_unlike_length": [(1, 1), (130, 1), (9, 1), (64, 1), (8, 1)],
    "whole_prompts": [(33, 33), (7, 7)],
    "chunk_behind_a_context": [(61, 20)],
    "everything": [(50, 1), (3, 1), (70, 1), (45, 45), (90, 13), (16, 8)],
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("window", [None, 1, 12])
@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize("scattered", [False, True])
def test_equals_attention_written_out(mix: str, window: int | None, extra: str, scattered: bool) -> None:
    shape = AttentionShape(6, 2, HEAD_DIM, HEAD_DIM**-0.5, window, 5.0 if extra == "softcap" else None)
    sinks = torch.linspace(-1, 2, 6) if extra == "sinks" else None
    world = World(MIXES[mix], shape, scattered=scattered)
    torch.testing.assert_close(world.attend(sinks).double(), world.expected(sinks), rtol=1e-5, atol=1e-5)


def test_many_decodes_are_split_into_bounded_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("powerband.engine.attention.reference._GATHERED", 64)
    shape = AttentionShape(4, 2, HEAD_DIM, HEAD_DIM**-0.5)
    world = World([(30 + i, 1) for i in range(9)], shape, scattered=True)
    torch.testing.assert_close(world.attend(None).double(), world.expected(None), rtol=1e-5, atol=1e-5)


def test_tiles_of_long_chunks_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("powerband.engine.attention.reference._QUERY_TILE", 16)
    shape = AttentionShape(4, 2, HEAD_DIM, HEAD_DIM**-0.5, 20, 4.0)
    world = World([(75, 50)], shape, scattered=True)
    torch.testing.assert_close(world.attend(None).double(), world.expected(None), rtol=1e-5, atol=1e-5)
