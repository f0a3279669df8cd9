from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from powerband.engine.layers.cpu import ACTIVATIONS, gated, use_cpu_layers
from powerband.engine.layers.mlp import GatedMLP
from powerband.engine.layers.norm import RMSNorm


def expected(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """In float64, rounded once."""
    gate, up = gate_up.double().chunk(2, -1)
    if activation == "silu":
        return (F.silu(gate) * up).to(gate_up.dtype)
    return (F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up).to(gate_up.dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 3, 40])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000, 3072])
def test_equals_torch(rows: int, size: int, dtype: torch.dtype, activation: str) -> None:
    gate_up = (torch.randn(rows, 2 * size, generator=torch.Generator().manual_seed(size)) * 3).to(dtype)
    torch.testing.assert_close(gated(gate_up, activation), expected(gate_up, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_long_row_is_shared_out(activation: str) -> None:
    gate_up = torch.randn(2, 2 * 100_001)
    torch.testing.assert_close(gated(gate_up, activation), expected(gate_up, activation), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_gate_is_accurate(activation: str) -> None:
    """Also far out, where the result is small (and float64 has lost it: torch adds 1 to a tanh near -1)."""
    gate = torch.linspace(-12, 12, 200_001)
    out = gated(torch.cat([gate, torch.ones_like(gate)]).unsqueeze(0), activation)[0]
    exact = expected(torch.cat([gate, torch.ones_like(gate)]).double().unsqueeze(0), activation)[0]
    torch.testing.assert_close(out.double(), exact, rtol=2e-5, atol=1e-15)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes(activation: str, dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e30, -200.0, -100.0, -0.0, 0.0, 100.0, 200.0, 1e30], dtype=dtype)
    out = gated(torch.cat([gate, torch.ones_like(gate)]).unsqueeze(0), activation)[0]
    assert torch.equal(out, gate.clamp(min=0))


def test_not_a_number_stays_where_it_is() -> None:
    gate_up = torch.ones(2, 20)
    gate_up[1, 3] = float("nan")
    out = gated(gate_up, "silu")
    assert out.isnan().sum() == 1
    assert out[1, 3].isnan()


@pytest.mark.parametrize("gate_up", [torch.ones(2, 3), torch.ones(4)])
def test_refuses_what_has_no_halves(gate_up: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="gate_up must be"):
        torch.ops.powerband.gated(gate_up, 0)


def test_refuses_an_unknown_activation_and_type() -> None:
    with pytest.raises(RuntimeError, match="the activation is"):
        torch.ops.powerband.gated(torch.ones(2, 4), 3)
    with pytest.raises(RuntimeError, match="of its type"):
        torch.ops.powerband.gated(torch.ones(2, 4, dtype=torch.float16), 0)


def test_a_models_layers_compute_the_same_with_kernels() -> None:
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    mlp = GatedMLP(24, 40, "silu", bias=False, dtype=torch.float32, device=cpu)
    model = torch.nn.Sequential(RMSNorm(24, 1e-6, dtype=torch.float32, device=cpu), mlp)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(5, 24)
    plain = model(x)
    use_cpu_layers(model)
    assert mlp.gated is gated
    torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-4)


def test_a_float16_model_stays_with_torch() -> None:
    norm = RMSNorm(8, 1e-6, dtype=torch.float16, device=torch.device("cpu"))
    use_cpu_layers(norm)
    assert norm.kernel is None
