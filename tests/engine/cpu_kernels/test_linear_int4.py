from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from powerband.engine.linear.int4 import Int4LinearMethod, pack, unpack
from powerband.engine.linear.quantized import QuantizedProvider
from powerband.engine.linear.quantized_weights import Int4Weight, dequantize, quantize_int4
from powerband.errors import UsageError

SHAPES = [(16, 64, 32), (50, 200, 128), (33, 100, 100), (48, 104, 40), (40, 1024, 128), (1, 8, 8), (17, 77, 128)]


def random_weight(out: int, inputs: int, group: int, *, zeros: bool, seed: int = 0) -> Int4Weight:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-inputs // group)
    return Int4Weight(
        torch.randint(0, 16, (out, inputs), dtype=torch.uint8, generator=generator),
        torch.rand(out, groups, generator=generator) * 0.02 + 0.001,
        torch.randint(0, 16, (out, groups), dtype=torch.uint8, generator=generator) if zeros else None,
        group,
    )


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize(("out", "inputs"), [(16, 8), (1, 1), (33, 100), (160, 64)])
def test_packing_is_the_references_and_comes_back(out: int, inputs: int) -> None:
    values = random_weight(out, inputs, 128, zeros=False).values
    packed = torch.ops.powerband.pack_int4(values)
    assert torch.equal(packed, pack(values))
    assert torch.equal(torch.ops.powerband.unpack_int4(packed, out, inputs), values)
    assert torch.equal(unpack(packed, out, inputs), values)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5, 9])
@pytest.mark.parametrize(("out", "inputs", "group"), SHAPES)
def test_few_rows_are_exact_where_activations_fit_int8(
    out: int, inputs: int, group: int, rows: int, *, zeros: bool
) -> None:
    """Whole numbers with 127 in every group are their own int8 form."""
    weight = random_weight(out, inputs, group, zeros=zeros)
    x = torch.randint(-127, 128, (rows, inputs), generator=torch.Generator().manual_seed(1)).float()
    x[:, ::group] = 127
    bias = torch.arange(out).bfloat16()
    expected = x @ dequantize(weight).T + bias.float()
    actual = Int4LinearMethod.from_weight(weight, bias)(x.bfloat16())
    torch.testing.assert_close(actual, expected.bfloat16(), rtol=0.01, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 16, 24, 33, 70])
@pytest.mark.parametrize(("out", "inputs", "group"), SHAPES)
def test_equals_the_dequantized_product(out: int, inputs: int, group: int, rows: int, *, zeros: bool) -> None:
    weight = random_weight(out, inputs, group, zeros=zeros)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).bfloat16()
    expected = F.linear(x.float(), dequantize(weight))
    # int8 activations: 1/127 of a group's extreme, of some three standard deviations, is a step
    tolerance = 0.01 if out * rows > 200 else 0.03
    assert relative_error(Int4LinearMethod.from_weight(weight)(x), expected) < tolerance


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_adds_to_the_residual_with_one_rounding(rows: int) -> None:
    weight = random_weight(50, 256, 128, zeros=False)
    x, residual = torch.randn(rows, 256).bfloat16(), torch.randn(rows, 50).bfloat16()
    product = Int4LinearMethod.from_weight(weight, torch.ones(50).bfloat16())
    expected = (residual.float() + F.linear(x.float(), dequantize(weight)) + 1).bfloat16()
    product.add_to(residual, x)
    assert relative_error(residual, expected) < 0.01


def test_no_rows_are_no_rows() -> None:
    product = Int4LinearMethod.from_weight(random_weight(20, 64, 32, zeros=True))
    assert product(torch.empty(0, 64, dtype=torch.bfloat16)).shape == (0, 20)
    product.add_to(torch.empty(0, 20, dtype=torch.bfloat16), torch.empty(0, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [3, 40])
def test_what_is_not_finite_stays_in_its_row(rows: int, bad: float) -> None:
    x = torch.randn(rows, 128).bfloat16()
    x[1, 7] = bad
    out = Int4LinearMethod.from_weight(random_weight(20, 128, 32, zeros=False))(x)
    assert not out[1].isfinite().any()
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e30])
def test_extreme_activations(scale: float) -> None:
    weight = random_weight(32, 128, 64, zeros=False)
    x = (torch.randn(2, 128) * scale).bfloat16()
    expected = F.linear(x.float(), dequantize(weight)).bfloat16()
    torch.testing.assert_close(Int4LinearMethod.from_weight(weight)(x), expected, rtol=0.05, atol=0.02 * scale + 1e-30)


def test_its_tensors_make_the_product_again() -> None:
    weight, bias = torch.randn(40, 256).bfloat16(), torch.randn(40).bfloat16()
    product = QuantizedProvider("int4", group_size=64, kernels=True).prepare(weight, bias)
    assert isinstance(product, Int4LinearMethod)
    x = torch.randn(4, 256).bfloat16()
    expected = F.linear(x.float(), dequantize(quantize_int4(weight, 64)), bias.float())
    assert relative_error(product(x), expected) < 0.01
    assert torch.equal(Int4LinearMethod.from_tensors(product.tensors())(x), product(x))


def test_wide_activations_are_not_quantized() -> None:
    weight = random_weight(40, 256, 128, zeros=True)
    x = torch.randn(3, 256)
    torch.testing.assert_close(Int4LinearMethod.from_weight(weight)(x), F.linear(x, dequantize(weight)))


@pytest.mark.parametrize("group", [16, 36])
def test_refuses_groups_that_no_kernel_takes(group: int) -> None:
    with pytest.raises(UsageError, match=f"groups of {group}"):
        Int4LinearMethod.from_weight(random_weight(16, 256, group, zeros=False))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": torch.zeros(2, 72).bfloat16()}, "as deep as x is wide"),
        ({"packed": torch.zeros(3, 8, 16, 4, dtype=torch.uint8)}, "must have out_features"),
        ({"scales": torch.zeros(2, 3, 16)}, "scales must be"),
        ({"zeros": torch.zeros(2, 2, 15, dtype=torch.uint8)}, "shape of scales"),
        ({"bias": torch.zeros(33).bfloat16()}, "bias must have out_features"),
        ({"out_features": 33}, "must have out_features"),
        ({"group_size": 12}, "multiple of 8"),
        ({"group_size": 0}, "multiple of 8"),
        ({"x": torch.zeros(2, 64)}, "x must be contiguous"),
        ({"packed": torch.zeros(2, 8, 16, 4, dtype=torch.int8)}, "packed must be contiguous"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, object], complaint: str) -> None:
    arguments: dict[str, object] = {
        "x": torch.zeros(2, 64).bfloat16(),
        "packed": torch.zeros(2, 8, 16, 4, dtype=torch.uint8),
        "scales": torch.zeros(2, 2, 16),
        "zeros": None,
        "bias": None,
        "out_features": 32,
        "group_size": 32,
    }
    with pytest.raises(RuntimeError, match=complaint):
        torch.ops.powerband.linear_int4(**(arguments | change))
    with pytest.raises(RuntimeError, match=complaint):
        torch.ops.powerband.linear_int4_add(**(arguments | change), residual=torch.zeros(2, 32).bfloat16())


def test_refuses_a_residual_of_another_shape() -> None:
    packed, scales = torch.zeros(2, 8, 16, 4, dtype=torch.uint8), torch.zeros(2, 2, 16)
    x, residual = torch.zeros(2, 64).bfloat16(), torch.zeros(2, 31).bfloat16()
    with pytest.raises(RuntimeError, match="residual must be"):
        torch.ops.powerband.linear_int4_add(x, packed, scales, None, None, 32, 32, residual)
