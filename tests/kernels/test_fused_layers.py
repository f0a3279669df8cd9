"""Fused kernels between the matrix products against the layers' own plain operators."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")

from powerband.engine.kernels.fused_layers import ACTIVATIONS, gated, rms_norm
from powerband.engine.layers import mlp
from powerband.engine.layers.norm import RMSNorm

DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"]
)


def random(*shape, device, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


@DTYPES
@pytest.mark.parametrize("float32_weight", [False, True])
@pytest.mark.parametrize("size", [48, 128])
def test_norm(size, float32_weight, dtype, tolerance, device):
    norm = RMSNorm(size, 1e-5, dtype=dtype, device=device, float32_weight=float32_weight)
    torch.nn.init.normal_(norm.weight)
    x = random(5, size, device=device, dtype=dtype)
    torch.testing.assert_close(rms_norm(x, norm.weight, norm.eps), norm(x), atol=tolerance, rtol=tolerance)


@DTYPES
def test_norm_of_a_part_of_wider_rows(dtype, tolerance, device):
    norm = RMSNorm(32, 1e-5, dtype=dtype, device=device)
    torch.nn.init.normal_(norm.weight)
    part = random(5, 80, device=device, dtype=dtype)[:, 32:64]
    result = rms_norm(part, norm.weight, norm.eps)
    torch.testing.assert_close(result, norm(part.contiguous()), atol=tolerance, rtol=tolerance)


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_product_in_one_pass(activation, dtype, tolerance, device):
    gate_up = 4 * random(3, 2 * 72, device=device, dtype=dtype)
    expected = mlp.gated(gate_up.clone(), activation)
    torch.testing.assert_close(gated(gate_up, activation), expected, atol=tolerance, rtol=tolerance)
