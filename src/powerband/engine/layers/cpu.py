"""Layers computed by C++ kernels: the norm, and the activation with its product.

Each reads and writes its data once. Computed in float32 and rounded once.
"""

from __future__ import annotations

import torch

from powerband.engine.layers.experts import Experts
from powerband.engine.layers.mlp import GatedMLP
from powerband.engine.layers.norm import RMSNorm

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")  # in the order of csrc/gated.cpp


def use_cpu_layers(model: torch.nn.Module) -> None:
    """Let kernels do the work of the model's norms, gated MLPs and experts. Needs `library.load().tier`.

    A float16 model stays with torch.
    """
    if any(parameter.dtype is torch.float16 for parameter in model.parameters()):
        return
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.kernel = rms_norm
        elif isinstance(module, (GatedMLP, Experts)):
            module.gated = gated


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm of x [..., size] over its last dimension. bf16 or float32."""
    out: torch.Tensor = torch.ops.powerband.rms_norm(x.contiguous(), weight, eps)
    return out


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(first half) * second half: [tokens, 2 * size] → [tokens, size]. bf16 or float32."""
    out: torch.Tensor = torch.ops.powerband.gated(gate_up.contiguous(), ACTIVATIONS.index(activation))
    return out
