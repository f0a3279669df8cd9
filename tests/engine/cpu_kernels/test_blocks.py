"""A layer's MLP as one operator against its parts, and what it refuses. Whole layers: ../test_cpu_blocks.py."""

from __future__ import annotations

import pytest
import torch

ops = torch.ops.powerband


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def run(block: int, hidden: torch.Tensor) -> None:
    """A step that the MLP does not look at, and the end of the block."""
    none = torch.zeros(0, dtype=torch.int32)
    try:
        ops.run_blocks([block], hidden, [], [], [none.long()], none, none, [none[None]], 0)
    finally:
        ops.free_blocks([block])


@pytest.mark.parametrize("rows", [0, 1, 5, 40])
@pytest.mark.parametrize("post_norm", [False, True])
def test_equals_its_parts(rows: int, post_norm: bool) -> None:
    hidden, norm, post = random(rows, 48), random(48), random(48) if post_norm else None
    gate_up, down = ops.pack_bf16(random(140, 48)), ops.pack_bf16(random(48, 70))
    inner = ops.gated(ops.linear_bf16(ops.rms_norm(hidden, norm, 1e-6), gate_up, None, 140), 0)
    expected = hidden.clone()
    if post is None:
        ops.linear_bf16_add(inner, down, None, expected)
    else:
        expected += ops.rms_norm(ops.linear_bf16(inner, down, None, 48), post, 1e-6)
    run(ops.mlp_block(norm, post, 1e-6, [gate_up], 0, [down], 0, 70, 0), hidden)
    torch.testing.assert_close(hidden, expected, rtol=0.01 if post_norm else 0, atol=0.01 if post_norm else 0)


def test_refuses_what_does_not_fit() -> None:
    hidden, packed = torch.zeros(2, 64).bfloat16(), ops.pack_bf16(torch.zeros(64, 64).bfloat16())
    wide = ops.pack_bf16(torch.zeros(128, 64).bfloat16())
    good = [None, None, 1e-6, [wide], 0, [packed], 0, 64, 0]
    run(ops.mlp_block(*good), hidden)
    with pytest.raises(RuntimeError, match="hidden must be contiguous"):
        run(ops.mlp_block(*good), hidden.float())
    with pytest.raises(RuntimeError, match="hidden must be"):
        run(ops.mlp_block(*good), hidden[0])
    for place, wrong, complaint in [
        (0, torch.zeros(63).bfloat16(), "as long as a row"),
        (1, torch.zeros(65).bfloat16(), "as long as a row"),
        (3, [packed], "one panel per"),
        (3, [], "must have tensors"),
        (3, [wide, torch.zeros(128).bfloat16(), torch.zeros(128).bfloat16()], "too many"),
        (3, [wide.view(torch.int8)], "scales and sums"),
        (3, [wide.view(torch.uint8)], "must have scales"),
        (3, [torch.zeros(4)], "packed in"),
        (5, [wide], "one panel per"),
        (7, 0, "must be positive"),
        (7, 32, "one panel per"),
        (8, 3, "activation is"),
    ]:
        with pytest.raises(RuntimeError, match=complaint):
            run(ops.mlp_block(*good[:place], wrong, *good[place + 1 :]), hidden)


def test_a_block_that_was_freed_is_no_block() -> None:
    packed = ops.pack_bf16(torch.zeros(64, 32).bfloat16())
    block = ops.mlp_block(None, None, 1e-6, [packed], 0, [ops.pack_bf16(torch.zeros(32, 32).bfloat16())], 0, 32, 0)
    run(block, torch.zeros(1, 32).bfloat16())
    for number in (block, 0, -1):
        with pytest.raises(RuntimeError, match="no such block"):
            run(number, torch.zeros(1, 32).bfloat16())
