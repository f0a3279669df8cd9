"""Chunks of new tokens over paged keys and values, against attention written out in float64.

What lies in the cache beyond a request's end, and in blocks that nobody owns, is not a number: it must not get through.
"""

from __future__ import annotations

import math

import pytest
import torch
from attention_for_tests import BLOCK, World, assert_close, store

from powerband.engine.attention.base import AttentionShape

LENGTHS = [2, 15, 16, 17, 31, 33, 64, 100, 257]
FIRSTS = [0, 1, 31, 32, 100, 1000]


def shape(
    heads: int = 4, kv_heads: int = 2, dim: int = 64, window: int | None = None, softcap: float | None = None
) -> AttentionShape:
    return AttentionShape(heads, kv_heads, dim, dim**-0.5, window, softcap)


def expected(world: World, sinks: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(mask(cap(q k^T * scale))) v in float64, all queries of a request at once."""
    form = world.shape
    group = form.num_heads // form.num_kv_heads
    results = []
    for q, k, v in zip(world.queries, world.keys, world.values, strict=True):
        keys, values = (t.double().repeat_interleave(group, dim=1).transpose(0, 1) for t in (k, v))
        scores = q.double().transpose(0, 1) @ keys.mT * form.scale
        if form.softcap:
            scores = form.softcap * torch.tanh(scores / form.softcap)
        query, key = torch.arange(len(k) - len(q), len(k)).unsqueeze(1), torch.arange(len(k))
        hidden = (key > query) | (key <= query - (form.window or math.inf))
        scores = scores.masked_fill(hidden, -math.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double().view(-1, 1, 1).expand(-1, len(q), 1)], dim=-1)
        results.append((scores.softmax(-1)[..., : len(k)] @ values).transpose(0, 1))
    return torch.cat(results)


@pytest.mark.parametrize("first", FIRSTS)
@pytest.mark.parametrize("length", LENGTHS)
def test_every_chunk(length: int, first: int) -> None:
    world = World([(first + length, length)], shape())
    assert_close(world.attend(), expected(world))


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 160])
def test_every_shape(group: int, dim: int) -> None:
    world = World([(133, 33), (2, 2)], shape(2 * group, 2, dim))
    assert_close(world.attend(), expected(world))


@pytest.mark.parametrize("first", FIRSTS)
@pytest.mark.parametrize("window", [1, 24, 100])
def test_windows(window: int, first: int) -> None:
    world = World([(first + 100, 100), (first + 2, 2)], shape(window=window))
    assert_close(world.attend(), expected(world))


@pytest.mark.parametrize("window", [1, 24, 100])
def test_what_has_left_the_window_is_not_read(window: int) -> None:
    world = World([(350, 50)], shape(window=window))
    exact = expected(world)
    world.keys[0][: 301 - window] = torch.nan
    world.values[0][: 301 - window] = torch.nan
    assert_close(world.attend(), exact)


@pytest.mark.parametrize("window", [None, 40])
def test_soft_cap(window: int | None) -> None:
    world = World([(400, 65)], shape(window=window, softcap=30.0))
    world.queries[0] *= 20
    assert_close(world.attend(), expected(world))


@pytest.mark.parametrize("sink", [-math.inf, -3.0, 0.0, 50.0])
@pytest.mark.parametrize("window", [None, 1])
def test_sinks(sink: float, window: int | None) -> None:
    world = World([(300, 33), (17, 17)], shape(window=window))
    sinks = torch.tensor([sink, 1.0, -1.0, 2.0])
    assert_close(world.attend(sinks), expected(world, sinks))


@pytest.mark.parametrize("factor", [0.0, 30.0, 1000.0])
def test_scores_of_any_size(factor: float) -> None:
    world = World([(600, 40)], shape())
    world.queries[0] *= factor
    assert_close(world.attend(), expected(world))


def test_scores_that_grow_from_block_to_block() -> None:
    world = World([(900, 50)], shape())
    ramp = (torch.arange(900) / 90).bfloat16().view(-1, 1, 1)
    world.keys[0] = world.queries[0][:1, :1].expand(900, 2, -1) * ramp
    assert_close(world.attend(), expected(world))


def test_several_requests_in_a_step() -> None:
    world = World([(70, 1), (257, 257), (40, 3), (333, 64)], shape(8, 2, 128))
    assert_close(world.attend(), expected(world))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads: int) -> None:
    world = World([(300, 200), (90, 30)], shape(8, 2, 128))
    alone = world.attend()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = world.attend()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, together)


def test_not_a_number_stays_in_its_query() -> None:
    world = World([(100, 40)], shape())
    world.queries[0][7, 2, 3] = torch.nan
    out = world.attend()
    assert out[7, 2].isnan().all()
    out[7, 2] = 0
    assert not out.isnan().any()


def test_the_tail_of_the_last_block_is_not_read() -> None:
    world = World([(50, 20)], shape())
    backend = world.backend()
    garbage = torch.full((BLOCK * 2 - 50, 2, 64), math.inf, dtype=torch.bfloat16)
    store(backend.cache[0], world.slots(0, 50, 2 * BLOCK), garbage, garbage)
    out = backend.attend_unrotated(0, world.qkv(), None, None, world.batch(), world.shape)
    assert_close(out, expected(world))


@pytest.mark.parametrize("first", FIRSTS)
def test_a_chunk_of_one_token(first: int) -> None:
    world = World([(first + 1, 1)], shape())
    batch = world.batch()
    batch.num_decodes = 0
    out = world.backend().attend_unrotated(0, world.qkv(), None, None, batch, world.shape)
    assert_close(out, expected(world))
