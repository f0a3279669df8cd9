"""Decodes, one new token per request, against attention in float64: shapes, contexts, windows, caps, sinks."""

from __future__ import annotations

import pytest
import torch
from attention_for_tests import BLOCK, World, assert_close

from powerband.engine.attention.base import AttentionShape

CONTEXTS = (1, 31, 32, 33, 1000)


def shape(heads: int = 4, kv_heads: int = 2, dim: int = 64, **changes: float) -> AttentionShape:
    return AttentionShape(heads, kv_heads, dim, dim**-0.5, **changes)  # type: ignore[arg-type]  # window is an int


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 9, 17])
def test_every_shape(group: int, dim: int) -> None:
    world = World([(context, 1) for context in (5, 70)], shape(2 * group, 2, dim))
    assert_close(world.attend(), world.expected())


@pytest.mark.parametrize("heads", [2, 4])
def test_every_context(heads: int) -> None:
    world = World([(context, 1) for context in CONTEXTS], shape(heads, 2))
    assert_close(world.attend(), world.expected())


@pytest.mark.parametrize("window", [1, 24, 100, 600])
def test_windows(window: int) -> None:
    world = World([(context, 1) for context in (*CONTEXTS, 513, 1536)], shape(4, 2, window=window))
    assert_close(world.attend(), world.expected())


@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_soft_cap(softcap: float) -> None:
    world = World([(context, 1) for context in CONTEXTS], shape(softcap=softcap))
    assert_close(world.attend(), world.expected())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks(dtype: torch.dtype) -> None:
    world = World([(context, 1) for context in CONTEXTS], shape())
    sinks = torch.tensor([-3.0, 0.0, 4.0, 40.0]).to(dtype)
    assert_close(world.attend(sinks), world.expected(sinks))


def test_large_scores_do_not_overflow() -> None:
    world = World([(context, 1) for context in CONTEXTS], shape())
    world.queries = [q * 100 for q in world.queries]
    out = world.attend()
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), world.expected(), atol=0.05, rtol=0.05)


def test_a_request_does_not_depend_on_its_neighbours() -> None:
    together = World([(context, 1) for context in (700, 40, 1500)], shape())
    out = together.attend()
    batch = together.batch()
    for row in range(3):
        alone = World([together.works[row]], together.shape)
        alone.num_blocks, alone.tables = together.num_blocks, batch.block_tables[row : row + 1].clone()
        for name in ("queries", "keys", "values"):
            setattr(alone, name, [getattr(together, name)[row]])
        assert torch.equal(alone.attend()[0], out[row])


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads: int) -> None:
    world = World([(2000, 1), (3, 1)], shape(4, 2, 128))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = world.attend()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, world.attend())


def test_not_a_number_stays_in_its_request() -> None:
    world = World([(40, 1), (40, 1), (40, 1)], shape())
    world.queries[0][:] = float("nan")
    world.values[2][3] = float("nan")
    out = world.attend()
    assert out[0].isnan().all()
    assert out[2].isnan().all()
    assert_close(out[1:2], world.expected()[1:2])


def test_tokens_without_a_slot_are_not_stored() -> None:
    world = World([(40, 1), (BLOCK + 1, 1)], shape())
    backend, batch = world.backend(), world.batch()
    batch.slots[1] = -1
    backend.cache[0][int(batch.block_tables[1, 1])] = 1.0  # position 32 of the second request, as if known before
    before = backend.cache[0][int(batch.block_tables[1, 1])].clone()
    backend.attend_unrotated(0, world.qkv(), None, None, batch, world.shape)
    assert torch.equal(backend.cache[0][int(batch.block_tables[1, 1])], before)
