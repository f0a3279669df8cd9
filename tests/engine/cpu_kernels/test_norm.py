from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from powerband.engine.layers.cpu import rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 3, 40])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 256, 1000, 4096])
def test_equals_torch(rows: int, size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows * 10000 + size)
    x = torch.randn(rows, size, generator=generator).to(dtype)
    weight = torch.randn(size, generator=generator).to(dtype)
    expected = F.rms_norm(x.float(), (size,), weight.float(), 1e-6).to(dtype)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), expected)


def test_wide_weights_are_applied_before_rounding() -> None:
    x, weight = torch.randn(4, 64).bfloat16(), torch.rand(64) + 0.5
    expected = F.rms_norm(x.float(), (64,), weight, 1e-6).bfloat16()
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), expected)


def test_not_a_number_stays_in_its_row() -> None:
    x = torch.randn(3, 64)
    x[1, 7] = float("nan")
    out = rms_norm(x, torch.ones(64), 1e-6)
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()


@pytest.mark.parametrize("weight", [torch.ones(63), torch.ones(1, 64)])
def test_refuses_what_does_not_fit(weight: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="weight must be as long as a row"):
        rms_norm(torch.randn(2, 64), weight, 1e-6)
