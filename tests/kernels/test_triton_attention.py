"""Triton's kernels against the reference backend: mixes of chunks and decodes, each thing that attention can have.

On a machine without a GPU they run in Triton's interpreter; without Triton they are skipped.
"""

import pytest
import torch

from powerband.engine.attention.base import AttentionBatch, AttentionShape, HeadNorm
from powerband.engine.attention.reference import ReferenceAttention

pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")

from powerband.engine.attention.triton import TritonAttention

BLOCK_SIZE = 16
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
MIXES = {
    "decodes": [(1, 1), (1, 129)],
    "chunks": [(37, 37), (5, 60)],
    "mixed": [(1, 40), (20, 20), (3, 70)],
}
# name: (heads, kv heads, head_dim, window, softcap, sinks)
SHAPES = {
    "plain": (4, 4, 16, None, None, False),
    "grouped": (6, 2, 32, None, None, False),
    "odd head_dim": (7, 1, 24, None, None, False),
    "window": (4, 2, 16, 19, None, False),
    "softcap": (4, 2, 16, None, 3.0, False),
    "sinks": (4, 2, 16, None, None, True),
    "everything": (8, 2, 64, 33, 5.0, True),
}


def make_batch(mix, device, seed=0):
    """Rows of (new tokens, context) over blocks in random order; decodes first."""
    generator = torch.Generator().manual_seed(seed)
    lens = [context for _, context in mix]
    per_row = [-(-context // BLOCK_SIZE) for context in lens]
    shuffled = torch.randperm(sum(per_row) + 5, generator=generator).tolist()
    tables = torch.zeros(len(mix), max(per_row) + 2, dtype=torch.int32)
    starts, slots = [0], []
    for row, (new, context) in enumerate(mix):
        blocks = [shuffled.pop() for _ in range(per_row[row])]
        tables[row, : len(blocks)] = torch.tensor(blocks)
        starts.append(starts[-1] + new)
        slots += [blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(context - new, context)]
    batch = AttentionBatch(
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        context_lens=torch.tensor(lens, dtype=torch.int32, device=device),
        block_tables=tables.to(device),
        slots=torch.tensor(slots, device=device),
        num_decodes=sum(new == 1 for new, _ in mix),
        query_starts_host=starts,
        context_lens_host=lens,
    )
    return batch, sum(per_row) + 5


def history(mix):
    """The same rows with everything but their new tokens, to fill the cache first."""
    return [(context - new, context - new) for new, context in mix if context > new]


def both_backends(shape, dtype, device, num_blocks, poison=True):
    reference = ReferenceAttention(BLOCK_SIZE, device)
    kernels = TritonAttention(BLOCK_SIZE, device)
    for backend in (reference, kernels):
        backend.allocate(1, num_blocks, shape, dtype)
    if poison:
        # What an earlier owner left in a block must never be seen.
        for cache in kernels._cache[0]:
            cache.fill_(float("nan"))
    return reference, kernels


def fill(backends, mix, batch, shape, dtype, device, generator):
    """Write random K and V for every position before the new tokens, through each backend."""
    rows = [row for row, (new, context) in enumerate(mix) if context > new]
    if not rows:
        return
    before = history(mix)
    starts, slots = [0], []
    for row, (count, _) in zip(rows, before, strict=True):
        starts.append(starts[-1] + count)
        table = batch.block_tables[row].tolist()
        slots += [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(count)]
    past = AttentionBatch(
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        context_lens=torch.tensor([c for c, _ in before], dtype=torch.int32, device=device),
        block_tables=batch.block_tables[rows],
        slots=torch.tensor(slots, device=device),
        num_decodes=0,
        query_starts_host=starts,
        context_lens_host=[c for c, _ in before],
    )
    q = torch.zeros(starts[-1], shape.num_heads, shape.head_dim, dtype=dtype, device=device)
    k, v = (
        torch.randn(starts[-1], shape.num_kv_heads, shape.head_dim, generator=generator).to(device, dtype)
        for _ in range(2)
    )
    for backend in backends:
        backend.begin(past)
        backend.attend(0, q, k, v, past, shape)


def make_shape(name):
    heads, kv_heads, head_dim, window, softcap, has_sinks = SHAPES[name]
    return AttentionShape(heads, kv_heads, head_dim, head_dim**-0.5, window, softcap), has_sinks


@pytest.mark.parametrize(
    ("name", "mix", "dtype"),
    [(name, mix, torch.float32) for name in SHAPES for mix in MIXES]
    + [(name, "mixed", torch.bfloat16) for name in SHAPES],
)
def test_kernels_equal_the_reference(name, mix, dtype, device):
    shape, has_sinks = make_shape(name)
    generator = torch.Generator().manual_seed(1)
    batch, num_blocks = make_batch(MIXES[mix], device)
    backends = both_backends(shape, dtype, device, num_blocks)
    fill(backends, MIXES[mix], batch, shape, dtype, device, generator)
    tokens = batch.query_starts_host[-1]
    heads = shape.num_heads + 2 * shape.num_kv_heads
    qkv = torch.randn(tokens, heads, shape.head_dim, generator=generator).to(device, dtype)
    q, k, v = qkv.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
    sinks = torch.randn(shape.num_heads, generator=generator).to(device, dtype) if has_sinks else None
    outs = []
    for backend in backends:
        backend.begin(batch)
        outs.append(backend.attend(0, q, k, v, batch, shape, sinks))
    torch.testing.assert_close(outs[1], outs[0], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", ["window", "everything"])
def test_blocks_before_a_window_are_not_read(name, mix, device):
    """They have other owners, whose numbers need not be any."""
    shape, _ = make_shape(name)
    generator = torch.Generator().manual_seed(5)
    batch, num_blocks = make_batch(MIXES[mix], device)
    backends = both_backends(shape, torch.float32, device, num_blocks)
    fill(backends, MIXES[mix], batch, shape, torch.float32, device, generator)
    for row, (new, context) in enumerate(MIXES[mix]):
        passed = batch.block_tables[row, : max(context - new - shape.window + 1, 0) // BLOCK_SIZE].long()
        for cache in backends[1]._cache[0]:
            cache[passed] = float("nan")
    tokens, heads = batch.query_starts_host[-1], shape.num_heads + 2 * shape.num_kv_heads
    qkv = torch.randn(tokens, heads, shape.head_dim, generator=generator).to(device)
    q, k, v = qkv.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
    expected, found = (backend.attend(0, q, k, v, batch, shape) for backend in backends)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("splits", [1, 4, 16])
@pytest.mark.parametrize("name", ["grouped", "everything"])
def test_split_contexts_combine_to_the_same(name, splits, device, monkeypatch):
    """More runs than tiles too: a run without positions counts for nothing."""
    shape, has_sinks = make_shape(name)
    monkeypatch.setattr(TritonAttention, "_num_splits", lambda *args: splits)
    generator = torch.Generator().manual_seed(2)
    mix = [(1, 1), (1, 200), (1, 77)]
    batch, num_blocks = make_batch(mix, device)
    backends = both_backends(shape, torch.float32, device, num_blocks)
    fill(backends, mix, batch, shape, torch.float32, device, generator)
    q = torch.randn(3, shape.num_heads, shape.head_dim, generator=generator).to(device)
    k, v = (torch.randn(3, shape.num_kv_heads, shape.head_dim, generator=generator).to(device) for _ in range(2))
    sinks = torch.randn(shape.num_heads, generator=generator).to(device) if has_sinks else None
    outs = [backend.attend(0, q, k, v, batch, shape, sinks) for backend in backends]
    torch.testing.assert_close(outs[1], outs[0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("has_norm", [False, True], ids=["", "head norm"])
@pytest.mark.parametrize("rotary_dim", [0, 8, 24])
def test_fused_rotation_equals_separate_steps(rotary_dim, has_norm, device):
    shape = AttentionShape(num_heads=6, num_kv_heads=2, head_dim=24, scale=0.2)
    generator = torch.Generator().manual_seed(3)
    mix = MIXES["mixed"]
    batch, num_blocks = make_batch(mix, device)
    backends = both_backends(shape, torch.float32, device, num_blocks)
    fill(backends, mix, batch, shape, torch.float32, device, generator)
    tokens = batch.query_starts_host[-1]
    qkv = torch.randn(tokens, 10, 24, generator=generator).to(device)
    weights = torch.randn(8, 24, generator=generator).to(device)
    angles = torch.randn(tokens, 1, rotary_dim // 2, generator=generator).to(device)
    sin = torch.cat([-angles.sin(), angles.sin()], dim=-1)
    rotation = (torch.cat([angles.cos()] * 2, dim=-1), sin) if rotary_dim else None
    norm = HeadNorm(weights, 1e-6) if has_norm else None

    expected, fused = (b.attend_unrotated(0, qkv, rotation, norm, batch, shape) for b in backends)
    torch.testing.assert_close(fused, expected, atol=2e-5, rtol=2e-5)


def test_padding_rows_touch_nothing_and_give_zeros(device):
    """A captured graph runs at its full size: rows beyond the real ones have no context and slot -1."""
    shape = AttentionShape(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25)
    kernels = TritonAttention(BLOCK_SIZE, device)
    kernels.allocate(1, 4, shape, torch.float32)
    batch = AttentionBatch(
        query_starts=torch.tensor([0, 1, 2], dtype=torch.int32, device=device),
        context_lens=torch.tensor([1, 0], dtype=torch.int32, device=device),
        block_tables=torch.tensor([[2], [0]], dtype=torch.int32, device=device),
        slots=torch.tensor([2 * BLOCK_SIZE, -1], device=device),
        num_decodes=2,
        query_starts_host=[0, 1, 2],
        context_lens_host=[64, 64],
    )
    q = torch.ones(2, 4, 16, device=device)
    k, v = torch.ones(2, 2, 16, device=device), torch.full((2, 2, 16), 3.0, device=device)
    out = kernels.attend(0, q, k, v, batch, shape)
    assert (out[0] == 3).all()
    assert (out[1] == 0).all()
    written = kernels._cache[0][1].nonzero()[:, 0].unique().tolist()
    assert written == [2]
