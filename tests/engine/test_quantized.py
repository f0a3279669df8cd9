"""Weights in eight and four bits: how near they are, what they compute, and their edges."""

from __future__ import annotations

import pytest
import torch

from powerband.engine.linear.quantized_weights import (
    INT4_ZERO,
    Int4Weight,
    Int8Weight,
    dequantize,
    int8_product,
    quantize_int4,
    quantize_int8,
    quantize_rows,
)


def seeded(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def relative_error(estimate: torch.Tensor, exact: torch.Tensor) -> float:
    return float((estimate - exact).square().sum() / exact.square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (700, 900)])
def test_int8_is_within_half_a_step(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = seeded(*shape).to(dtype)
    quantized = quantize_int8(weight)
    steps = (weight.float() / quantized.scales[:, None]).double()
    assert quantized.values.dtype is torch.int8
    assert quantized.values.abs().amax(1).eq(127).all()
    assert (steps - quantized.values).abs().max() <= 0.5 + 1e-4
    assert quantized.shape == shape


def test_int8_rounds_halves_to_even() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert quantize_int8(weight).values.tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("group_size", [32, 100, 128])
@pytest.mark.parametrize("shape", [(1, 1), (5, 99), (300, 1000)])
def test_int4_is_at_least_as_near_as_round_to_nearest(shape: tuple[int, int], group_size: int) -> None:
    weight = seeded(*shape)
    quantized = quantize_int4(weight, group_size)
    groups = torch.split(weight, group_size, dim=1)
    plain = [group.abs().amax(1, keepdim=True) / 7 for group in groups]
    nearest = torch.cat([(group / step).round() * step for group, step in zip(groups, plain, strict=True)], dim=1)
    assert quantized.scales.shape == (shape[0], len(groups))
    assert quantized.values.max() <= 15
    assert relative_error(dequantize(quantized), weight) <= relative_error(nearest, weight)


def test_int4_error_on_gaussian_weights() -> None:
    weight = seeded(256, 1024)
    assert relative_error(dequantize(quantize_int4(weight)), weight) < 0.0100  # max / 7 reaches 0.0138


def test_rows_of_zeros_stay_zeros() -> None:
    weight = torch.zeros(2, 40)
    weight[1] = 1.0
    for quantized in (quantize_int8(weight), quantize_int4(weight, 16)):
        assert torch.equal(dequantize(quantized)[0], weight[0])
        torch.testing.assert_close(dequantize(quantized), weight)
        assert quantized.scales.isfinite().all()


def test_without_rows_or_inputs() -> None:
    for shape in ((0, 8), (8, 0)):
        assert dequantize(quantize_int8(torch.zeros(shape))).shape == shape
        assert dequantize(quantize_int4(torch.zeros(shape))).shape == shape


def test_dequantize_knows_zeros_and_a_shorter_last_group() -> None:
    values = torch.tensor([[0, 15, 8, 3, 9]], dtype=torch.uint8)
    zeros = torch.tensor([[1, 2, 9]], dtype=torch.uint8)
    scales = torch.tensor([[1.0, 10.0, 100.0]])
    assert dequantize(Int4Weight(values, scales, zeros, 2)).tolist() == [[-1, 14, 60, 10, 0]]
    assert dequantize(Int4Weight(values, scales, None, 2)).tolist() == [[-8, 7, 0, -50, 100]]
    assert INT4_ZERO == 8


def test_activations_are_scaled_per_token() -> None:
    x = seeded(6, 50) * torch.logspace(-6, 6, 6)[:, None]
    values, scales = quantize_rows(x)
    torch.testing.assert_close(scales, x.abs().amax(1) / 127)
    assert ((x / scales[:, None]) - values).abs().max() <= 0.5 + 1e-4


def test_a_token_that_is_not_finite_spoils_only_itself() -> None:
    weight = quantize_int8(seeded(20, 30))
    x = seeded(4, 30).bfloat16()
    expected = int8_product(x, weight)
    x[1, 3], x[2, 4] = float("nan"), float("-inf")
    out = int8_product(x, weight)
    assert out[[1, 2]].isnan().all()
    assert torch.equal(out[[0, 3]], expected[[0, 3]])


def test_tiny_and_empty_tokens_are_zeros() -> None:
    x = torch.zeros(3, 8)
    x[1, 0] = 1e-38
    values, scales = quantize_rows(x)
    assert not values.any()
    assert not scales.any()
    assert quantize_rows(torch.zeros(0, 8))[1].shape == (0,)
    assert quantize_rows(torch.zeros(2, 0))[1].tolist() == [0, 0]


def test_the_product_is_near_the_exact_one() -> None:
    weight, x, bias = seeded(200, 512), seeded(9, 512).bfloat16(), seeded(200)
    exact = x.float() @ weight.T + bias
    assert relative_error(int8_product(x, quantize_int8(weight), bias).float(), exact) < 3e-4


def test_the_product_is_a_sum_of_whole_numbers() -> None:
    weight = Int8Weight(torch.full((1, 70_000), 127, dtype=torch.int8), torch.ones(1))
    out = int8_product(torch.full((1, 70_000), 127.0), weight)
    assert out.item() == pytest.approx(127 * 127 * 70_000, rel=1e-6)
