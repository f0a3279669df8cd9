"""Linear layers with int8 weights against the reference product, whose sums are the same whole numbers."""

from __future__ import annotations

import pytest
import torch

from powerband.engine.linear.int8 import Int8LinearMethod, pack
from powerband.engine.linear.quantized_weights import Int8Weight, int8_product

ops = torch.ops.powerband


def seeded(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def random_weight(out_features: int, in_features: int) -> Int8Weight:
    generator = torch.Generator().manual_seed(out_features * 10_000 + in_features)
    values = torch.randint(-128, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
    return Int8Weight(values, torch.rand(out_features, generator=generator) * 0.01)


def packed(weight: Int8Weight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return ops.pack_int8(weight.values), weight.scales, weight.values.sum(1, dtype=torch.int32)


def linear(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    out: torch.Tensor = ops.linear_int8(x, *packed(weight), bias, weight.shape[0])
    return out


def unit(x: torch.Tensor) -> torch.Tensor:
    """The distance from x to the next bfloat16."""
    return x.float().abs().clamp_min(1e-30) * 2**-7


@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (17, 65), (40, 130), (33, 3)])
def test_packing_pads_with_zeros_and_can_be_undone(shape: tuple[int, int]) -> None:
    values = random_weight(*shape).values
    form = ops.pack_int8(values)
    assert torch.equal(form, pack(values))
    assert torch.equal(ops.unpack_int8(form, *shape), values)
    into = torch.full_like(form, 99)
    ops.pack_int8_out(values, into)
    assert torch.equal(into, form)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 15, 16, 17, 31, 32, 33, 49, 64, 65, 130])
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (50, 100), (200, 640), (136, 1030)])
def test_equals_the_reference(shape: tuple[int, int], rows: int) -> None:
    weight, x = random_weight(*shape), seeded(rows, shape[1]).bfloat16()
    assert torch.equal(linear(x, weight), int8_product(x, weight))


@pytest.mark.parametrize("rows", [1, 4, 16, 40])
def test_adds_bias_before_rounding(rows: int) -> None:
    weight, x, bias = random_weight(50, 100), seeded(rows, 100).bfloat16(), seeded(50).bfloat16()
    expected = int8_product(x, weight, bias)
    assert bool(((linear(x, weight, bias).float() - expected.float()).abs() <= unit(expected)).all())


@pytest.mark.parametrize("rows", [0, 1, 4, 16, 40])
@pytest.mark.parametrize("out_features", [50, 64])
def test_adds_to_the_residual_and_rounds_once(rows: int, out_features: int) -> None:
    weight, x = random_weight(out_features, 100), seeded(rows, 100).bfloat16()
    residual = seeded(rows, out_features).bfloat16()
    expected = (int8_product(x.float(), weight) + residual.float()).bfloat16()
    ops.linear_int8_add(x, *packed(weight), None, residual)
    assert bool(((residual.float() - expected.float()).abs() <= unit(expected)).all())


@pytest.mark.parametrize("rows", [1, 3, 9, 40])
def test_the_largest_sums_do_not_overflow(rows: int) -> None:
    weight = Int8Weight(torch.full((20, 65_536), -128, dtype=torch.int8), torch.full((20,), 1e-6))
    for sign in (1.0, -1.0):
        x = torch.full((rows, 65_536), sign).bfloat16()
        assert torch.equal(linear(x, weight), int8_product(x, weight))


@pytest.mark.parametrize("rows", [3, 9, 40])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_row(rows: int, bad: float) -> None:
    weight, x = random_weight(40, 100), seeded(rows, 100).bfloat16()
    expected = linear(x, weight)
    x[1, 99] = bad
    out = linear(x, weight)
    assert out[1].isnan().all()
    others = torch.arange(rows) != 1
    assert torch.equal(out[others], expected[others])


def test_tiny_and_huge_rows() -> None:
    weight, x = random_weight(40, 100), seeded(5, 100).bfloat16()
    x[0] = 0
    x[1] *= 1e-38
    x[2] *= 1e-20
    x[3] *= 1e30
    out = linear(x, weight)
    assert not out[:2].any()
    assert torch.equal(out, int8_product(x, weight))


def test_rows_give_the_same_alone_and_together() -> None:
    weight, x = random_weight(70, 200), seeded(50, 200).bfloat16()
    together = linear(x, weight)
    assert torch.equal(together, torch.cat([linear(row[None], weight) for row in x]))


@pytest.mark.parametrize("rows", [0, 1, 4, 5, 16, 33, 70])
@pytest.mark.parametrize("shape", [(1, 64), (50, 100), (1000, 640)])
def test_the_largest_of_each_row_is_that_of_the_product(shape: tuple[int, int], rows: int) -> None:
    weight, x = random_weight(*shape), seeded(rows, shape[1]).bfloat16()
    if rows > 3:
        x[2, 0] = float("nan")
        x[3] = 0  # all results are equal
    product = Int8LinearMethod.from_weight(weight)
    expected = product(x).float().max(-1)
    ids, values = product.argmax(x)
    assert torch.equal(ids, expected.indices)
    assert torch.equal(values.nan_to_num(nan=9e9), expected.values.nan_to_num(nan=9e9))


def test_refuses_what_does_not_fit() -> None:
    weight, x = random_weight(40, 100), seeded(2, 100).bfloat16()
    form, scales, sums = packed(weight)
    wrong = [
        ((seeded(2, 200).bfloat16(), form, scales, sums, None, 40), "packed must be"),
        ((x[0], form, scales, sums, None, 40), "x must be"),
        ((x.float(), form, scales, sums, None, 40), "x must be contiguous"),
        ((x, form, scales, sums, None, 60), "packed must be"),
        ((x, form, scales, sums, None, 0), "no features"),
        ((x, form[:, :, :8], scales, sums, None, 40), "packed must be"),
        ((x, form, scales[:39], sums, None, 40), "scales must be"),
        ((x, form, scales.double(), sums, None, 40), "scales must be"),
        ((x, form, scales, sums[:39], None, 40), "sums must be"),
        ((x, form, scales, sums, torch.zeros(41).bfloat16(), 40), "bias must be"),
        ((seeded(100, 2).bfloat16().T, form, scales, sums, None, 40), "x must be contiguous"),
    ]
    for arguments, complaint in wrong:
        with pytest.raises(RuntimeError, match=complaint):
            ops.linear_int8(*arguments)
    for arguments, complaint in (wrong[0], wrong[1], wrong[2], wrong[5], wrong[7], wrong[8]):
        with pytest.raises(RuntimeError, match=complaint):
            ops.argmax_int8(*arguments[:4])
    for residual in (torch.zeros(3, 40), torch.zeros(2, 41), torch.zeros(80)):
        with pytest.raises(RuntimeError, match="must be"):
            ops.linear_int8_add(x, form, scales, sums, None, residual.bfloat16())
    with pytest.raises(RuntimeError, match="no features"):
        ops.pack_int8(torch.zeros(0, 4, dtype=torch.int8))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_can_be_saved_and_restored(dtype: torch.dtype, with_bias: bool) -> None:
    weight, x = random_weight(50, 100), seeded(5, 100).to(dtype)
    product = Int8LinearMethod.from_weight(weight, seeded(50).bfloat16() if with_bias else None)
    restored = Int8LinearMethod.from_tensors(product.tensors())
    assert torch.equal(restored.weight().values, weight.values)
    expected = int8_product(x, weight, product.bias)
    torch.testing.assert_close(restored(x), expected)
    residual = seeded(5, 50).to(dtype)
    total = residual + expected
    restored.add_to(residual, x)
    torch.testing.assert_close(residual, total, rtol=0.016, atol=0.02)  # rounded once, and twice
    assert restored.memory_bytes > 64 * 128


def test_the_kernels_decline_more_inputs_than_their_sums_can_hold() -> None:
    def weight(out_features: int, in_features: int) -> Int8Weight:
        return Int8Weight(torch.zeros(out_features, in_features, dtype=torch.int8), torch.ones(out_features))

    assert Int8LinearMethod.takes(weight(1, 65_536))
    assert not Int8LinearMethod.takes(weight(1, 65_537))
    assert not Int8LinearMethod.takes(weight(0, 8))
