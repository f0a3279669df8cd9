"""A layer's MLP as one operator against its parts, and what it refuses. Whole layers: ../test_cpu_blocks.py."""

from __future__ import annotations

import pytest
import torch

ops = torch.ops.powerband


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


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
    ops.mlp_block(hidden, norm, post, 1e-6, [gate_up], 0, [down], 0, 70, 0)
    torch.testing.assert_close(hidden, expected, rtol=0.01 if post_norm else 0, atol=0.01 if post_norm else 0)


def test_refuses_what_does_not_fit() -> None:
    hidden, packed = torch.zeros(2, 64).bfloat16(), ops.pack_bf16(torch.zeros(64, 64).bfloat16())
    wide = ops.pack_bf16(torch.zeros(128, 64).bfloat16())
    good = [hidden, None, None, 1e-6, [wide], 0, [packed], 0, 64, 0]
    ops.mlp_block(*good)
    for place, wrong, complaint in [
        (0, hidden.float(), "hidden must be contiguous"),
        (0, hidden[0], "hidden must be"),
        (1, torch.zeros(63).bfloat16(), "as long as a row"),
        (2, torch.zeros(65).bfloat16(), "as long as a row"),
        (4, [packed], "one panel per"),
        (4, [], "must have tensors"),
        (4, [wide, torch.zeros(128).bfloat16(), torch.zeros(128).bfloat16()], "too many"),
        (4, [wide.view(torch.int8)], "scales and sums"),
        (4, [wide.view(torch.uint8)], "must have scales"),
        (4, [torch.zeros(4)], "packed in"),
        (6, [wide], "one panel per"),
        (8, 0, "must be positive"),
        (8, 32, "one panel per"),
        (9, 3, "activation is"),
    ]:
        arguments = [*good[:place], wrong, *good[place + 1 :]]
        with pytest.raises(RuntimeError, match=complaint):
            ops.mlp_block(*arguments)
