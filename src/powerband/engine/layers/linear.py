"""The matrix product of every projection, and the one place where faster or quantized providers of it come in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn


class Product(Protocol):
    """x @ weight.T + bias, with the weight in whatever form the provider keeps it."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """residual += product of x, in place, rounded once where the provider can."""
        ...


class LinearProvider(Protocol):
    """One way to compute x @ weight.T + bias. The reference is `torch.nn.functional.linear`."""

    name: str

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product | None:
        """Take the loaded weight [out, in] in whatever form suits; None: not for this weight."""
        ...


class Linear(nn.Module):
    """y = x @ weight.T + bias for x [tokens, in_features]."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = parameter(out_features, in_features, dtype=dtype, device=device)
        self.bias = parameter(out_features, dtype=dtype, device=device) if bias else None
        self.provider = "torch"
        self._product: Product | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._product is not None:
            return self._product(x)
        return F.linear(x, self.weight, self.bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """residual [tokens, out_features] += product of x, in place."""
        if self._product is not None:
            self._product.add_to(residual, x)
        elif self.bias is not None:
            residual.add_(F.linear(x, self.weight, self.bias))
        else:
            residual.addmm_(x, self.weight.t())

    def use(self, provider: LinearProvider) -> bool:
        """Hand the weight over to `provider`, which keeps its own form of it. False: it declines."""
        product = provider.prepare(self.weight, self.bias)
        if product is None:
            return False
        self._product = product
        self.provider = provider.name
        self.weight = parameter(0, dtype=self.weight.dtype, device=self.weight.device)
        return True


def parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Uninitialised memory that weights are loaded into."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)


def use_providers(model: nn.Module, providers: Iterable[LinearProvider]) -> dict[str, int]:
    """After loading: give each projection to the first provider that takes it. Returns how many each one has."""
    counts: dict[str, int] = {}
    candidates = list(providers)
    for module in model.modules():
        if isinstance(module, Linear):
            any(module.use(provider) for provider in candidates)
            counts[module.provider] = counts.get(module.provider, 0) + 1
    return counts
