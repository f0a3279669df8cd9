"""The matrix product of every projection, and the one place where faster or quantized providers of it come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import nn

from powerband.engine.linear.adapters import ActiveAdapters


class LinearMethod(Protocol):
    """x @ weight.T + bias, with the weight in the form that its provider gave it."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """residual += product of x, in place, rounded once where the provider can."""
        ...


@runtime_checkable
class SupportsArgmax(Protocol):
    """A product that finds its largest result without storing the others."""

    def argmax(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Per row of x, without bias, the lowest index of the largest result (int64) and its value (float32).

        The largest of a row that holds NaN is its first NaN.
        """
        ...


@runtime_checkable
class SupportsFusion(Protocol):
    """A product of the CPU kernels, which operators that compute several things in a row may take over."""

    def packed_operands(self) -> tuple[list[torch.Tensor], int]:
        """The tensors of its weight, as csrc/blocks.cpp orders them, and the group size of int4 (else 0)."""
        ...


class LinearProvider(Protocol):
    """One way to compute x @ weight.T + bias. The reference is `torch.nn.functional.linear`."""

    name: str

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> LinearMethod | None:
        """Take the loaded weight [out, in] in the provider's form; None if it does not support this weight."""
        ...


@dataclass(frozen=True, slots=True)
class WeightMatrix:
    """A weight [out, in] as it is loaded, before a product takes its place."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class LinearModule(Protocol):
    """A part of the model that multiplies with one or more matrices: a `Linear`, or the `Experts` of a layer."""

    def matrices(self) -> list[WeightMatrix]:
        """Views of the parameters, in a fixed order."""
        ...

    def install(self, methods: Sequence[LinearMethod], provider: str) -> None:
        """Compute with these from now on, one for each matrix, and let the weights go."""
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
        self._method: LinearMethod | None = None
        self._adapters: tuple[ActiveAdapters, str] | None = None

    def use_adapters(self, active: ActiveAdapters, name: str) -> None:
        """From now on, add what the active adapters have for the projection `name`."""
        self._adapters = active, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.linear(x, self.weight, self.bias) if self._method is None else self._method(x)
        if self._adapters is not None:
            active, name = self._adapters
            active.add_to(name, out, x)
        return out

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """residual [tokens, out_features] += product of x, in place."""
        if self._adapters is not None:
            active, name = self._adapters
            active.add_to(name, residual, x)
        if self._method is not None:
            self._method.add_to(residual, x)
        elif self.bias is not None:
            residual.add_(F.linear(x, self.weight, self.bias))
        else:
            residual.addmm_(x, self.weight.t())

    def argmax(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """As `SupportsArgmax.argmax`; None where the product can only compute everything."""
        if self.bias is not None or not isinstance(self._method, SupportsArgmax):
            return None
        return self._method.argmax(x)

    def packed_operands(self) -> tuple[list[torch.Tensor], int] | None:
        """As `Packed.packed_operands`; None where something else computes."""
        return self._method.packed_operands() if isinstance(self._method, SupportsFusion) else None

    def matrices(self) -> list[WeightMatrix]:
        return [WeightMatrix(self.weight, self.bias)]

    def install(self, methods: Sequence[LinearMethod], provider: str) -> None:
        [self._method] = methods
        self.provider = provider
        self.weight = parameter(0, dtype=self.weight.dtype, device=self.weight.device)


def parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Uninitialised memory that weights are loaded into."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)
