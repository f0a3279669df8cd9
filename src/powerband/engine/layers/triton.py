"""Layers computed by Triton kernels (kernels/): the norm, the activation with its product, and experts."""

from __future__ import annotations

import torch

from powerband.engine.kernels.fused_layers import gated, rms_norm
from powerband.engine.kernels.grouped_matmul import grouped_matmul
from powerband.engine.layers.experts import Experts
from powerband.engine.layers.mlp import GatedMLP
from powerband.engine.layers.norm import RMSNorm


def use_fused_layers(model: torch.nn.Module) -> None:
    """Let kernels do the work of the model's norms, gated MLPs and experts."""
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.kernel = rms_norm
        elif isinstance(module, GatedMLP):
            module.gated = gated
        elif isinstance(module, Experts):
            module.kernel = run_experts


def run_experts(experts: Experts, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The weighted sum of each token's experts: x [tokens, hidden]; weights, chosen [tokens, experts per token]."""
    per_token = chosen.shape[1]
    ranked, order = chosen.flatten().sort(stable=True)
    bounds = torch.arange(len(experts.gate_up) + 1, device=x.device)
    offsets = torch.searchsorted(ranked, bounds).int()
    inner = grouped_matmul(x, experts.gate_up, experts.gate_up_bias, offsets, order, per_token)
    outputs = grouped_matmul(experts.activated(inner), experts.down, experts.down_bias, offsets)
    unsorted = torch.empty_like(outputs)
    unsorted[order] = outputs
    return (unsorted.view(-1, per_token, x.shape[-1]) * weights.unsqueeze(-1)).sum(dim=1)
