"""The gated MLP: down(activation(gate(x)) * up(x)), gate and up in one product."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from powerband.engine.linear.base import Linear
from powerband.errors import UsageError


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(first half) * second half: [tokens, 2 * size] → [tokens, size]."""
    gate, up = gate_up.chunk(2, dim=-1)
    match activation:
        case "silu":
            return F.silu(gate).mul_(up)
        case "gelu_tanh":
            return F.gelu(gate, approximate="tanh").mul_(up)
        case "gelu":
            return F.gelu(gate).mul_(up)
    raise UsageError(f"activation {activation!r} is unknown.", hint="Use silu, gelu_tanh or gelu.")


class GatedMLP(nn.Module):
    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.intermediate_size = intermediate_size
        self.gated: Callable[[torch.Tensor, str], torch.Tensor] = gated  # a device may have something faster
        self.gate_up = Linear(hidden_size, 2 * intermediate_size, bias=bias, dtype=dtype, device=device)
        self.down = Linear(intermediate_size, hidden_size, bias=bias, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(self.inner(x))
        return out

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """residual += forward(x), in place."""
        self.down.add_to(residual, self.inner(x))

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] → [tokens, intermediate]."""
        return self.gated(self.gate_up(x), self.activation)
