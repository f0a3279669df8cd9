"""What adapters add, by the kernels: equal to plain torch for every rank, number of rows and mixture of adapters."""

from __future__ import annotations

import pytest
import torch

from powerband.engine.linear.adapters import (
    ActiveAdapters,
    AdapterDelta,
    AdapterRows,
    AdapterWeights,
    KernelDelta,
    Piece,
)

IN, SIZES = 96, (48, 16, 20)  # of q, k and v; the last fills no panel


def delta(ranks: tuple[int, ...], seed: int) -> AdapterDelta:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    pieces, first_rank, start = [], 0, 0
    for rank, size in zip(ranks, SIZES, strict=True):
        if rank:
            pieces.append(Piece(random(size, rank), start, first_rank))
        first_rank, start = first_rank + rank, start + size
    return AdapterDelta(random(first_rank, IN), tuple(pieces))


def expected(out: torch.Tensor, x: torch.Tensor, groups: list[tuple[AdapterDelta, int, int]]) -> torch.Tensor:
    """In float32, the inner values rounded."""
    result = out.float()
    for one, start, end in groups:
        inner = (x[start:end].float() @ one.a.float().t()).bfloat16().float()
        for piece in one.pieces:
            size, rank = piece.b.shape
            ranks = inner[:, piece.first_rank : piece.first_rank + rank]
            result[start:end, piece.start : piece.start + size] += ranks @ piece.b.float().t()
    return result


@pytest.mark.parametrize("ranks", [(16, 16, 16), (1, 3, 5), (8, 0, 40), (0, 64, 0)], ids=str)
@pytest.mark.parametrize("rows", [(1,), (4, 3), (1, 0, 14), (40, 2, 129)], ids=str)
def test_equal_to_torch(ranks: tuple[int, ...], rows: tuple[int, ...]) -> None:
    """rows: of each adapter; before, between and after them are some without one."""
    generator = torch.Generator().manual_seed(1)
    groups, start = [], 2
    for index, count in enumerate(rows):
        groups.append((delta(ranks, index), start, start + count))
        start += count + index
    x = torch.randn(start + 1, IN, generator=generator).bfloat16()
    out = torch.randn(start + 1, sum(SIZES), generator=generator).bfloat16()
    right = expected(out, x, groups)
    active = ActiveAdapters()
    for index, (one, first, end) in enumerate(groups):
        weights = AdapterWeights(str(index), max(ranks), {"qkv": KernelDelta(one)})
        active.groups.append(AdapterRows(weights, first, end))
    found = out.clone()
    active.add_to("qkv", found, x)
    active.add_to("another projection", found, x)
    torch.testing.assert_close(found.float(), right, atol=0.3, rtol=0.02)
    assert torch.equal(found[:2], out[:2])
    assert torch.equal(found[-1], out[-1])


def test_what_the_kernels_are_given_is_checked() -> None:
    one = KernelDelta(delta((4, 4, 4), 0))
    x, out = torch.zeros(3, IN, dtype=torch.bfloat16), torch.zeros(3, sum(SIZES), dtype=torch.bfloat16)
    add = torch.ops.powerband.add_adapter_deltas
    for arguments in (
        ([one.number], [0], [4]),
        ([one.number], [2], [1]),
        ([one.number + 999], [0], [1]),
        ([1], [], []),
    ):
        with pytest.raises(RuntimeError):
            add(*arguments, x, out)
    with pytest.raises(RuntimeError):
        add([one.number], [0], [1], torch.zeros(3, 64, dtype=torch.bfloat16), out)
    with pytest.raises(RuntimeError):
        add([one.number], [0], [1], x, torch.zeros(3, 50, dtype=torch.bfloat16))
