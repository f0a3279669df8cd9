"""Products with packed bf16 weights against torch, in float32 and rounded once."""

from __future__ import annotations

import pytest
import torch

from powerband.engine.linear import bf16 as reference
from powerband.engine.linear.base import Linear
from powerband.engine.linear.bf16 import Bf16Provider

ROWS = [0, 1, 2, 3, 5, 7, 8, 12, 13, 16, 17, 31, 32, 33, 40, 100]
SHAPES = [(1, 1), (15, 31), (16, 32), (17, 33), (33, 64), (48, 257), (100, 1000), (256, 288)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).bfloat16()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    out: torch.Tensor = torch.ops.powerband.linear_bf16(x, torch.ops.powerband.pack_bf16(weight), bias, len(weight))
    return out


def exact(x: torch.Tensor, weight: torch.Tensor, *added: torch.Tensor) -> torch.Tensor:
    return sum((t.double() for t in added), start=x.double() @ weight.double().T).bfloat16()


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    """To one unit in the last place, or what float32 sums of a thousand numbers about 1 may lose where they cancel."""
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_packing_equals_the_reference_and_back(out_features: int, in_features: int) -> None:
    weight = random(out_features, in_features)
    packed = torch.ops.powerband.pack_bf16(weight)
    assert torch.equal(packed, reference.pack(weight))
    assert torch.equal(torch.ops.powerband.unpack_bf16(packed, out_features, in_features), weight)
    assert torch.equal(reference.unpack(packed, out_features, in_features), weight)


def test_packs_into_memory_that_was_used_before() -> None:
    weight = random(20, 40)
    packed = torch.full(reference.packed_shape(20, 40), float("nan"), dtype=torch.bfloat16)
    torch.ops.powerband.pack_bf16_out(weight, packed)
    assert torch.equal(packed, reference.pack(weight))


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_equals_the_exact_product_rounded(rows: int, out_features: int, in_features: int) -> None:
    x, weight, bias = random(rows, in_features), random(out_features, in_features, seed=1), random(out_features, seed=2)
    assert_close(linear(x, weight), exact(x, weight))
    assert_close(linear(x, weight, bias), exact(x, weight, bias))


@pytest.mark.parametrize("rows", ROWS)
def test_adds_to_the_residual_and_rounds_once(rows: int) -> None:
    x, weight, bias, residual = random(rows, 100), random(75, 100, seed=1), random(75, seed=2), random(rows, 75, seed=3)
    expected = exact(x, weight, bias, residual)
    torch.ops.powerband.linear_bf16_add(x, torch.ops.powerband.pack_bf16(weight), bias, residual)
    assert_close(residual, expected)


@pytest.mark.parametrize("rows", [500, 1100])
@pytest.mark.parametrize("in_features", [1024, 3072])
def test_many_rows_in_several_blocks(rows: int, in_features: int) -> None:
    x, weight = random(rows, in_features), random(144, in_features, seed=1)
    assert_close(linear(x, weight), exact(x, weight))


def test_several_threads_share_the_columns() -> None:
    x, weight = random(40, 512), random(3000, 512, seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        out = linear(x, weight)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, linear(x, weight))


@pytest.mark.parametrize("rows", [3, 16, 40, 70])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_stays_in_its_row(rows: int, bad: float) -> None:
    x, weight = random(rows, 96), random(40, 96, seed=1)
    expected = exact(x, weight)
    x[rows - 2, 7] = bad
    out = linear(x, weight)
    assert not out[rows - 2].isfinite().any()
    kept = [row for row in range(rows) if row != rows - 2]
    assert_close(out[kept], expected[kept])


def test_no_inputs_give_the_bias() -> None:
    bias = random(20)
    assert torch.equal(linear(torch.empty(17, 0).bfloat16(), torch.empty(20, 0).bfloat16(), bias), bias.expand(17, 20))


def argmax(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ids, values = torch.ops.powerband.argmax_bf16(x, torch.ops.powerband.pack_bf16(weight), len(weight))
    return ids, values


@pytest.mark.parametrize("out_features", [1, 15, 17, 50, 3000])
@pytest.mark.parametrize("rows", [*ROWS, 900])
def test_argmax_is_that_of_the_product(rows: int, out_features: int) -> None:
    x, weight = random(rows, 96), random(out_features, 96, seed=1)
    logits = linear(x, weight).float()
    ids, values = argmax(x, weight)
    expected = [row.index(max(row)) for row in logits.tolist()]  # torch does not promise the lowest of equals
    assert ids.tolist() == expected
    assert torch.equal(values, logits.max(1).values if rows else values)


@pytest.mark.parametrize("rows", [2, 20])
def test_argmax_of_equals_is_the_lowest(rows: int) -> None:
    weight = random(1000, 64)
    weight[[333, 334, 700]] = weight.sum(0) * 10
    x = weight[333].repeat(rows, 1)
    ids, _ = argmax(x, weight)
    assert ids.tolist() == [333] * rows
    assert argmax(torch.zeros(rows, 64).bfloat16(), weight)[0].tolist() == [0] * rows


@pytest.mark.parametrize("rows", [3, 20])
def test_argmax_of_negative_infinities_and_not_a_number(rows: int) -> None:
    weight = torch.ones(40, 32).bfloat16()
    x = torch.ones(rows, 32).bfloat16()
    x[0, 3], x[1, 4] = float("-inf"), float("nan")
    ids, values = argmax(x, weight)
    assert ids.tolist() == [0] * rows
    assert values[0] == float("-inf")
    assert values[1].isnan()
    assert values[2:].tolist() == [32.0] * (rows - 2)


@pytest.mark.parametrize(
    ("x", "bias", "out_features", "complaint"),
    [
        (torch.zeros(2, 33).bfloat16(), None, 20, "as deep as x is wide"),
        (torch.zeros(2, 32).bfloat16(), None, 33, "one panel per 16 columns"),
        (torch.zeros(2, 32).bfloat16(), torch.zeros(19).bfloat16(), 20, "bias must be"),
        (torch.zeros(2, 32), None, 20, "x must be contiguous"),
        (torch.zeros(2, 64).bfloat16()[:, ::2], None, 20, "x must be contiguous"),
        (torch.zeros(32).bfloat16(), None, 20, "x must be"),
    ],
)
def test_refuses_what_does_not_fit(
    x: torch.Tensor, bias: torch.Tensor | None, out_features: int, complaint: str
) -> None:
    packed = torch.ops.powerband.pack_bf16(random(20, 32))
    with pytest.raises(RuntimeError, match=complaint):
        torch.ops.powerband.linear_bf16(x, packed, bias, out_features)


def test_refuses_a_residual_of_another_shape() -> None:
    packed = torch.ops.powerband.pack_bf16(random(20, 32))
    for residual in (random(3, 20), random(2, 40), random(40)):
        with pytest.raises(RuntimeError, match=r"residual must be|one panel per"):
            torch.ops.powerband.linear_bf16_add(random(2, 32), packed, None, residual)


def test_provider_computes_what_the_layer_did_and_leaves_the_weight_to_others() -> None:
    layer = Linear(64, 40, bias=True, dtype=torch.bfloat16, device=torch.device("cpu"))
    layer.weight.copy_(random(40, 64))
    assert layer.bias is not None
    layer.bias.copy_(random(40))
    weight, x = layer.weight, random(5, 64, seed=1)
    before, total = layer(x), random(5, 40, seed=2)
    expected = exact(x, weight, layer.bias, total)
    product = Bf16Provider().prepare(layer.weight, layer.bias)
    assert product is not None
    layer.install([product], Bf16Provider.name)
    assert_close(layer(x), before)
    layer.add_to(total, x)
    assert_close(total, expected)
    assert torch.equal(weight, random(40, 64))


def test_provider_declines_other_types() -> None:
    assert Bf16Provider().prepare(torch.zeros(4, 4), None) is None
