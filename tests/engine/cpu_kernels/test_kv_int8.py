"""Attention over keys and values in int8, against attention in float64 over what is left of them after quantization."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_for_tests import BLOCK, World, assert_close, store_int8

from powerband.engine.attention.base import AttentionShape, HeadNorm
from powerband.engine.attention.cpu import CpuAttention

SHAPE = AttentionShape(4, 2, 64, 0.125)
DECODES = [(context, 1) for context in (1, 31, 32, 33, 513, 1536)]
CHUNKS = [(2, 2), (40, 40), (133, 33), (333, 20), (700, 45)]


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 9, 17])
def test_every_shape(group: int, dim: int) -> None:
    shape = AttentionShape(2 * group, 2, dim, dim**-0.5)
    world = World([(5, 1), (70, 1), (70, 33)], shape, int8=True)
    assert_close(world.attend(), world.expected())


@pytest.mark.parametrize("changes", [{}, {"window": 1}, {"window": 24}, {"window": 600}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("heads", [2, 4, 14])
def test_mixed_steps(heads: int, changes: dict[str, Any]) -> None:
    world = World(DECODES + CHUNKS, replace(SHAPE, num_heads=heads, **changes), int8=True)
    sinks = torch.randn(heads).bfloat16()
    assert_close(world.attend(), world.expected())
    assert_close(world.attend(sinks), world.expected(sinks))


def test_nothing_to_do() -> None:
    assert World([], SHAPE, int8=True).attend().shape == (0, 4, 64)


def test_keys_and_values_of_any_size() -> None:
    """Within a block they differ by orders of magnitude; some are zero."""
    world = World([(100, 1), (90, 50)], SHAPE, int8=True)
    for row, (context, _) in enumerate(world.works):
        generator = torch.Generator().manual_seed(row)
        sizes = torch.logspace(-6, 2, context)[torch.randperm(context, generator=generator)].view(-1, 1, 1)
        world.keys[row] = (world.keys[row] * sizes / 30).bfloat16()
        world.values[row] = (world.values[row] * sizes.flip(0)).bfloat16()
        world.keys[row][3] = world.values[row][5] = 0
    expected = world.expected()
    assert float(((world.attend() - expected).norm(dim=-1) / expected.norm(dim=-1)).max()) < 0.02


def test_values_of_zero_give_zero() -> None:
    world = World([(40, 1), (40, 20)], SHAPE, int8=True)
    for values in world.values:
        values.zero_()
    assert (world.attend() == 0).all()


@pytest.mark.parametrize("cuts", [(0, 150), (0, 5, 21, 22, 64, 150), tuple(range(151))], ids=["one", "some", "every"])
@pytest.mark.parametrize("dim", [32, 96, 128])
def test_what_is_stored(dim: int, cuts: tuple[int, ...]) -> None:
    """Chunks of any alignment store the same numbers and scales, those of the layout."""
    context = 150
    world = World([(context, context)], replace(SHAPE, head_dim=dim), int8=True)
    expected = world.backend().cache[0].zero_()
    store_int8(expected, world.slots(0, 0, context), world.keys[0], world.values[0])
    backend = world.backend()
    backend.cache[0].zero_()
    for start, end in pairwise(cuts):
        batch = replace(
            world.batch(),
            query_starts=torch.tensor([0, end - start], dtype=torch.int32),
            context_lens=torch.tensor([end], dtype=torch.int32),
            slots=world.slots(0, start, end),
            num_decodes=int(end - start == 1),
        )
        backend.attend_unrotated(0, world.qkv()[start:end].clone(), None, None, batch, world.shape)
    numbers, scales = _parts(backend.cache[0], dim)
    expected_numbers, expected_scales = _parts(expected, dim)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    assert (numbers.int() - expected_numbers.int()).abs().max() <= 1  # where rounding is a tie
    assert (numbers != expected_numbers).float().mean() < 1e-3


def _parts(cache: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return cache[..., : 2 * BLOCK * dim], cache[..., 2 * BLOCK * dim :].view(torch.float32)


def test_norm_and_rotation_come_first() -> None:
    """As close to the bf16 cache as int8 can be: about half a step of 1/127 of the largest element."""
    world = World(DECODES + CHUNKS, SHAPE)
    tokens = sum(new for _, new in world.works)
    angles = torch.randn(tokens, 1, 32)
    rotation = (torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1))
    norm = HeadNorm(torch.rand(6, 64) + 0.5, 1e-6)
    results = []
    for world.int8 in (False, True):
        results.append(world.backend().attend_unrotated(0, world.qkv(), rotation, norm, world.batch(), SHAPE).float())
    exact, found = results
    assert float((found - exact).norm() / exact.norm()) < 0.02


def test_a_request_does_not_depend_on_its_neighbours() -> None:
    together = World([(700, 1), (40, 1), (1500, 1), (300, 70)], SHAPE, int8=True)
    out = together.attend().split([1, 1, 1, 70])
    batch = together.batch()
    for row in range(4):
        alone = World([together.works[row]], SHAPE, int8=True)
        alone.num_blocks, alone.tables = together.num_blocks, batch.block_tables[row : row + 1].clone()
        for name in ("queries", "keys", "values"):
            setattr(alone, name, [getattr(together, name)[row]])
        assert torch.equal(alone.attend(), out[row])


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads: int) -> None:
    world = World([(2000, 1), (3, 1), (300, 200)], replace(SHAPE, head_dim=128), int8=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = world.attend()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, world.attend())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_request(bad: float) -> None:
    world = World([(40, 1), (40, 1), (40, 1), (70, 9), (80, 20), (90, 30)], SHAPE, int8=True)
    expected = world.expected().split([1, 1, 1, 9, 20, 30])
    world.queries[0][:] = bad
    world.values[2][-1, 0, 3] = bad
    world.keys[3][-1, 0, 3] = bad
    world.values[5][-1] = bad
    out = world.attend().split([1, 1, 1, 9, 20, 30])
    assert out[0].isnan().all()
    assert_close(out[1], expected[1])
    assert out[2][:, :2].isnan().all()  # the heads that share the first KV head
    assert_close(out[2][:, 2:], expected[2][:, 2:])
    assert out[3][-1, :2].isnan().all()
    assert_close(out[4], expected[4])
    assert out[5][-1].isnan().all()


@pytest.mark.parametrize("window", [1, 24, 100])
def test_what_has_left_the_window_is_not_read(window: int) -> None:
    world = World([(350, 1), (350, 50)], replace(SHAPE, window=window), int8=True)
    exact = world.expected()
    for keys, values, seen in zip(world.keys, world.values, (350 - window, 301 - window), strict=True):
        keys[:seen] = values[:seen] = torch.nan
    assert_close(world.attend(), exact)


@pytest.mark.parametrize("change", ["float", "short", "heads", "blocks"])
def test_malformed_caches_are_refused(change: str) -> None:
    world = World([(70, 1), (40, 20)], SHAPE, int8=True)
    backend = world.backend()
    cache = backend.cache[0]
    backend.cache[0] = {
        "float": cache.view(torch.uint8),
        "short": cache[..., : 64 * 64].contiguous(),
        "heads": cache[:, :1].contiguous(),
        "blocks": cache[:1],
    }[change]
    with pytest.raises(RuntimeError, match="powerband: "):
        backend.attend_unrotated(0, world.qkv(), None, None, world.batch(), SHAPE)


def test_memory_is_as_planned() -> None:
    backend = CpuAttention()
    backend.allocate(3, 7, SHAPE, torch.int8)
    assert sum(layer.nbytes for layer in backend.cache) == 3 * 7 * BLOCK * 2 * SHAPE.num_kv_heads * (64 + 4)
