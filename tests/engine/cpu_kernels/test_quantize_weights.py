from __future__ import annotations

import pytest
import torch

from powerband.engine.linear.bf16 import pack
from powerband.engine.linear.int4 import Int4LinearMethod
from powerband.engine.linear.int8 import Int8LinearMethod
from powerband.engine.linear.quantized_weights import dequantize, quantize_int4, quantize_int8

SHAPES = [(1, 1), (16, 64), (17, 100), (33, 128), (40, 300), (160, 1025)]


def weight_of(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.05).bfloat16()


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_the_references(shape: tuple[int, int]) -> None:
    weight = weight_of(*shape)
    found, expected = Int8LinearMethod.quantizing(weight), Int8LinearMethod.from_weight(quantize_int8(weight))
    for name, tensor in expected.tensors().items():
        assert torch.equal(found.tensors()[name], tensor), name


@pytest.mark.parametrize("group", [32, 40, 128, 2000])
@pytest.mark.parametrize("shape", SHAPES)
def test_int4_is_the_references_but_for_ties(shape: tuple[int, int], group: int) -> None:
    """Sums in another order may prefer another of two steps that are equally good."""
    weight = weight_of(*shape)
    found, expected = (
        Int4LinearMethod.quantizing(weight, group),
        Int4LinearMethod.from_weight(quantize_int4(weight, group)),
    )
    exact = weight.float()
    errors = [(dequantize(product.weight()) - exact).norm() for product in (found, expected)]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-3, atol=1e-6)
    same = (found.weight().values == expected.weight().values).float().mean()
    assert same > 0.98
    assert found.scales.shape == expected.scales.shape
    if same == 1:
        assert torch.equal(found.packed, expected.packed)
        torch.testing.assert_close(found.scales, expected.scales, rtol=1e-5, atol=0)


def test_int4_extremes() -> None:
    weight = torch.zeros(18, 256).bfloat16()
    weight[1] = 1
    weight[2] = -3e38
    weight[3, 7] = 1e-38
    weight[4, :128] = torch.arange(128) - 64
    found, expected = Int4LinearMethod.quantizing(weight, 128), Int4LinearMethod.from_weight(quantize_int4(weight, 128))
    torch.testing.assert_close(dequantize(found.weight()), dequantize(expected.weight()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows_in_its_scale_only(value: float) -> None:
    weight = weight_of(20, 256)
    weight[3, 130] = value
    eight, four = Int8LinearMethod.quantizing(weight), Int4LinearMethod.quantizing(weight, 128).weight()
    assert (~eight.scales.isfinite()).nonzero().tolist() == [[3]]
    assert (~four.scales.isfinite()).nonzero().tolist() == [[3, 1]]
    assert quantize_int8(weight).scales.isfinite().sum() == 19
    assert quantize_int4(weight, 128).scales.isfinite().sum() == 39


@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (15, 64), (32, 62), (48, 63), (50, 97), (64, 256)])
def test_bf16_panels_are_the_references(shape: tuple[int, int]) -> None:
    weight = weight_of(*shape)
    assert torch.equal(torch.ops.powerband.pack_bf16(weight), pack(weight))


def test_refuses_what_does_not_fit() -> None:
    weight = weight_of(16, 64)
    packed, scales, sums = torch.empty(1, 16, 16, 4).char(), torch.empty(16), torch.empty(16).int()
    with pytest.raises(RuntimeError, match="scales and sums"):
        torch.ops.powerband.quantize_int8_out(weight, packed, scales[:15], sums)
    with pytest.raises(RuntimeError, match="packed must be"):
        torch.ops.powerband.quantize_int8_out(weight, packed[:, :15], scales, sums)
    with pytest.raises(RuntimeError, match="weight"):
        torch.ops.powerband.quantize_int8_out(weight.float(), packed, scales, sums)
    nibbles = torch.empty(1, 8, 16, 4).byte()
    with pytest.raises(RuntimeError, match="groups must not be empty"):
        torch.ops.powerband.quantize_int4_out(weight, 0, nibbles, torch.empty(1, 1, 16))
    with pytest.raises(RuntimeError, match="scales must be"):
        torch.ops.powerband.quantize_int4_out(weight, 32, nibbles, torch.empty(1, 1, 16))
