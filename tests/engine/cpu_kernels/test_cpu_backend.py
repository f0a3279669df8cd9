"""The CPU's attention backend as a whole: norm, rotation and KV write, mixed steps, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_for_tests import World, assert_close

from powerband.engine.attention.base import AttentionShape, HeadNorm
from powerband.engine.attention.reference import ReferenceAttention

SHAPE = AttentionShape(4, 2, 64, 0.125)
MIXED = [(1, 1), (65, 1), (600, 1), (7, 7), (32, 32), (100, 100), (70, 33), (333, 20), (1000, 45)]


@pytest.mark.parametrize("changes", [{}, {"window": 24}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("heads", [2, 4, 14])
def test_mixed_steps(heads: int, changes: dict[str, Any]) -> None:
    world = World(MIXED, replace(SHAPE, num_heads=heads, **changes))
    sinks = torch.randn(heads).bfloat16()
    assert_close(world.attend(), world.expected())
    assert_close(world.attend(sinks), world.expected(sinks))


def test_nothing_to_do() -> None:
    assert World([], SHAPE).attend().shape == (0, 4, 64)


def test_rotated_tokens_are_attended_to_as_they_are() -> None:
    world = World(MIXED, SHAPE)
    q, k, v = torch.split(world.qkv(), [4, 2, 2], dim=1)
    assert_close(world.backend().attend(0, q, k, v, world.batch(), SHAPE), world.expected())


@pytest.mark.parametrize("dim", [32, 64, 96, 256])
@pytest.mark.parametrize("rotary_share", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("norm", [None, torch.float32, torch.bfloat16])
def test_norm_and_rotation(norm: torch.dtype | None, rotary_share: float, dim: int) -> None:
    shape = replace(SHAPE, head_dim=dim, scale=dim**-0.5)
    world = World([(1, 1), (65, 1), (70, 33), (40, 40)], shape)
    batch, tokens = world.batch(), 75
    angles = torch.randn(tokens, 1, int(dim * rotary_share) // 2)
    wide = norm is torch.float32
    cos = torch.cat([angles.cos()] * 2, -1).to(torch.float32 if wide else torch.bfloat16)
    sin = torch.cat([-angles.sin(), angles.sin()], -1).to(cos.dtype)
    rotation = (cos, sin) if rotary_share else None
    head_norm = HeadNorm((torch.rand(6, dim) + 0.5).to(norm), 1e-6) if norm is not None else None
    reference = ReferenceAttention(32, torch.device("cpu"))
    reference.allocate(1, world.num_blocks, shape, torch.float32)
    for row, (context, new) in enumerate(world.works):
        before = world.slots(row, 0, context - new)
        for cache, rows in zip(reference._cache[0], (world.keys[row], world.values[row]), strict=True):
            cache[:, before] = rows[: context - new].transpose(0, 1).float()
    wide_rotation = (cos.float(), sin.float()) if rotation else None
    wide_norm = HeadNorm(head_norm.weights.float(), 1e-6) if head_norm else None
    expected = reference.attend_unrotated(0, world.qkv().float(), wide_rotation, wide_norm, batch, shape)
    out = world.backend().attend_unrotated(0, world.qkv(), rotation, head_norm, batch, shape)
    torch.testing.assert_close(out.float(), expected, atol=3e-2, rtol=3e-2)


def test_chunks_are_stored_where_decodes_look() -> None:
    """Keys and values written by chunks of any alignment are those that single tokens write."""
    context = 150
    world = World([(context, context)], SHAPE)
    qkv, whole = world.qkv(), world.backend()
    whole.cache[0].zero_()
    whole.attend_unrotated(0, qkv.clone(), None, None, world.batch(), SHAPE)
    for cuts in ((0, 5, 21, 22, 64, 150), tuple(range(151))):
        pieces = world.backend()
        pieces.cache[0].zero_()
        for start, end in pairwise(cuts):
            batch = replace(
                world.batch(),
                query_starts=torch.tensor([0, end - start], dtype=torch.int32),
                context_lens=torch.tensor([end], dtype=torch.int32),
                slots=world.slots(0, start, end),
                num_decodes=int(end - start == 1),
            )
            pieces.attend_unrotated(0, qkv[start:end].clone(), None, None, batch, SHAPE)
        assert torch.equal(pieces.cache[0], whole.cache[0])


# ---- what is refused: name of an argument, what is put in its place, the complaint

_ARGUMENTS = (
    *("qkv", "cos", "sin", "norm_weights", "eps", "cache", "slots", "query_starts", "context_lens", "block_tables"),
    *("num_decodes", "num_heads", "num_kv_heads", "scale", "window", "softcap", "sinks"),
)


def _arguments() -> dict[str, Any]:
    world = World([(40, 1), (3, 1), (70, 33)], SHAPE)
    batch = world.batch()
    return {
        "qkv": world.qkv().flatten(1),
        "cos": torch.ones(35, 64).bfloat16(),
        "sin": torch.zeros(35, 64).bfloat16(),
        "norm_weights": torch.ones(6, 64),
        "eps": 1e-6,
        "cache": world.backend().cache[0],
        "slots": batch.slots,
        "query_starts": batch.query_starts,
        "context_lens": batch.context_lens,
        "block_tables": batch.block_tables,
        "num_decodes": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "scale": 0.125,
        "window": 0,
        "softcap": 0.0,
        "sinks": torch.zeros(4),
    }


def _changed(tensor: torch.Tensor, index: Any, value: int) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def test_the_arguments_below_are_right_before_they_are_spoilt() -> None:
    assert torch.ops.powerband.attend(*_arguments().values()).shape == (35, 256)
    assert tuple(_arguments()) == _ARGUMENTS


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("slots", lambda t: _changed(t, 0, 10**9)),
        ("slots", lambda t: _changed(t, 0, -2)),
        ("slots", lambda t: t.int()),
        ("slots", lambda t: t[:-1]),
        ("block_tables", lambda t: _changed(t, (0, 1), 10**6)),
        ("block_tables", lambda t: _changed(t, (2, 2), -1)),
        ("block_tables", lambda t: t[:, :2].contiguous()),
        ("block_tables", lambda t: t[:2]),
        ("block_tables", lambda t: t.long()),
        ("block_tables", lambda t: t.t().contiguous().t()),
        ("context_lens", lambda t: _changed(t, 0, 97)),
        ("context_lens", lambda t: _changed(t, 0, 0)),
        ("context_lens", lambda t: _changed(t, 1, -5)),
        ("context_lens", lambda t: _changed(t, 2, 32)),
        ("context_lens", lambda t: t[:2]),
        ("query_starts", lambda t: _changed(t, 0, 1)),
        ("query_starts", lambda t: _changed(t, 1, 0)),
        ("query_starts", lambda t: _changed(t, 1, 2)),
        ("query_starts", lambda t: _changed(t, 1, -7)),
        ("query_starts", lambda t: _changed(t, 3, 34)),
        ("query_starts", lambda t: _changed(t, 3, 36)),
        ("num_decodes", lambda _: 3),
        ("num_decodes", lambda _: 4),
        ("num_decodes", lambda _: -1),
        ("num_heads", lambda _: 0),
        ("num_heads", lambda _: 3),
        ("num_heads", lambda _: 8),
        ("num_kv_heads", lambda _: 0),
        ("num_kv_heads", lambda _: 4),
        ("window", lambda _: -1),
        ("softcap", lambda _: -1.0),
        ("qkv", lambda t: t[:-1]),
        ("qkv", lambda t: t.float()),
        ("qkv", lambda t: t[:, :-64]),
        ("cos", lambda t: t[:-1]),
        ("cos", lambda t: t.float()),
        ("cos", lambda _: None),
        ("sin", lambda t: t[:, :32].contiguous()),
        ("norm_weights", lambda t: t[:5]),
        ("norm_weights", lambda t: t.double()),
        ("cache", lambda t: t.float()),
        ("cache", lambda t: t[:, :, :-64].contiguous()),
        ("cache", lambda t: t[:, :1].contiguous()),
        ("cache", lambda t: t[:1]),
        ("sinks", lambda t: t[:3]),
        ("sinks", lambda t: t.double()),
    ],
)
def test_malformed_arguments_are_refused(name: str, spoil: Any) -> None:
    arguments = _arguments()
    arguments[name] = spoil(arguments[name])
    with pytest.raises(RuntimeError, match="powerband: "):
        torch.ops.powerband.attend(*arguments.values())
