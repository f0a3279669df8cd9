"""Mixture of experts: a router sends each token through a few of many MLPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from powerband.engine.layers.mlp import gated
from powerband.engine.linear.base import Linear, LinearMethod, WeightMatrix, parameter
from powerband.spec.model.model_spec import ModelSpec

# gpt-oss: gate and up are clamped, and the sigmoid is steeper (its reference implementation's constants).
CLAMP_LIMIT = 7.0
SIGMOID_ALPHA = 1.702


class ExpertsKernel(Protocol):
    """For x [tokens, hidden] the sum of the experts `chosen`, times `weights` (both [tokens, experts per token])."""

    def __call__(
        self, experts: Experts, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor: ...


class Experts(nn.Module):
    """Router and experts of one layer. Only experts that have tokens run, each once, over all of its tokens.

    gate_up: [experts, 2 * intermediate, hidden], gate rows first. down: [experts, hidden, intermediate].
    """

    def __init__(self, spec: ModelSpec, num_experts: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        hidden, inner = spec.hidden_size, spec.expert_intermediate_size
        self.spec = spec
        self.kernel: ExpertsKernel | None = None  # a device may have something faster
        self.gated: Callable[[torch.Tensor, str], torch.Tensor] = gated  # likewise
        self.provider = "torch"
        self._methods: list[tuple[LinearMethod, LinearMethod]] | None = None  # of each expert: gate and up, down
        self.router = Linear(hidden, num_experts, bias=spec.router_bias, dtype=dtype, device=device)
        self.gate_up = parameter(num_experts, 2 * inner, hidden, dtype=dtype, device=device)
        self.down = parameter(num_experts, hidden, inner, dtype=dtype, device=device)
        self.gate_up_bias = parameter(num_experts, 2 * inner, dtype=dtype, device=device) if spec.expert_bias else None
        self.down_bias = parameter(num_experts, hidden, dtype=dtype, device=device) if spec.expert_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.route(x)
        if self.kernel is not None:
            return self.kernel(self, x, weights, chosen)
        per_token = chosen.shape[1]
        # Assignments sorted by expert, so that the tokens of each expert lie together.
        experts = chosen.flatten()
        order = experts.argsort(stable=True)
        inputs = x[order // per_token]
        outputs = torch.empty_like(inputs)
        start = 0
        for expert, count in enumerate(torch.bincount(experts).tolist()):
            if count:
                outputs[start : start + count] = self._expert(expert, inputs[start : start + count])
                start += count
        unsorted = torch.empty_like(outputs)
        unsorted[order] = outputs
        return (unsorted.view(-1, per_token, x.shape[-1]) * weights.unsqueeze(-1)).sum(dim=1)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """residual += forward(x), in place."""
        residual.add_(self.forward(x))

    def matrices(self) -> list[WeightMatrix]:
        """The matrices of each expert in turn: gate and up together, then down."""
        found = []
        for expert in range(self.down.shape[0]):
            biases = [bias[expert] if bias is not None else None for bias in (self.gate_up_bias, self.down_bias)]
            found += [WeightMatrix(self.gate_up[expert], biases[0]), WeightMatrix(self.down[expert], biases[1])]
        return found

    def install(self, methods: Sequence[LinearMethod], provider: str) -> None:
        self._methods = list(zip(methods[::2], methods[1::2], strict=True))
        self.provider = provider
        self.gate_up = parameter(0, dtype=self.gate_up.dtype, device=self.gate_up.device)
        self.down = parameter(0, dtype=self.down.dtype, device=self.down.device)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights, experts), both [tokens, experts per token]."""
        logits: torch.Tensor = self.router(x)
        if self.spec.expert_activation == "gpt_oss":
            best, chosen = logits.topk(self.spec.num_experts_per_token, dim=-1)
            return best.softmax(dim=-1), chosen
        best, chosen = logits.softmax(dim=-1, dtype=torch.float32).topk(self.spec.num_experts_per_token, dim=-1)
        if self.spec.norm_topk_prob:
            best = best / best.sum(dim=-1, keepdim=True)
        return best.to(x.dtype), chosen

    def _expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        if self._methods is not None:
            gate_up_product, down_product = self._methods[expert]
            return down_product(self.activated(gate_up_product(x)))
        gate_up_bias = self.gate_up_bias[expert] if self.gate_up_bias is not None else None
        down_bias = self.down_bias[expert] if self.down_bias is not None else None
        gate_up = F.linear(x, self.gate_up[expert], gate_up_bias)
        return F.linear(self.activated(gate_up), self.down[expert], down_bias)

    def activated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[rows, 2 * intermediate] → [rows, intermediate]."""
        if self.spec.expert_activation == "gpt_oss":
            return _clamped_gate(gate_up)
        return self.gated(gate_up, self.spec.activation)


def _clamped_gate(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=CLAMP_LIMIT)
    up = up.clamp(min=-CLAMP_LIMIT, max=CLAMP_LIMIT)
    return (up + 1) * (gate * torch.sigmoid(gate * SIGMOID_ALPHA))
