"""Selects what multiplies with each matrix, and hands each matrix over as soon as its weights are loaded.

part               held in 16 or 32 bits       int8           int4
layers' matrices   kernels, oneDNN or torch    int8 kernel    int4 kernel
head               the same                    int8 kernel    int8 kernel
routers            the same                    the same       the same
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from powerband.engine.layers.experts import Experts
from powerband.engine.linear.base import Linear, LinearMethod, LinearModule, LinearProvider, WeightMatrix
from powerband.engine.linear.bf16 import Bf16LinearMethod, Bf16Provider
from powerband.engine.linear.onednn import OneDnnProvider
from powerband.engine.linear.quantized import (
    QuantizedMatrix,
    QuantizedProvider,
    kernel_name,
    stored_method,
    tensors_of,
)
from powerband.engine.models.registry import Model
from powerband.errors import UsageError
from powerband.spec.checkpoint.quantization import PLAIN, Held, WeightPrecisions


class LinearMethodSelector:
    """Gives every part of a model that multiplies with matrices its products, as soon as those are loaded."""

    def __init__(self, model: Model, held: WeightPrecisions = PLAIN, *, kernels: bool = False) -> None:
        self.model = model
        self.held = held
        self.kernels = kernels  # the C++ kernels may be used
        self.counts: Counter[str] = Counter()  # parts by who computes them
        self.memory_bytes = 0  # of matrices that are not parameters any more
        self.installed: list[tuple[LinearModule, Sequence[LinearMethod]]] = []
        self._routers = {id(module.router) for module in model.modules() if isinstance(module, Experts)}

    def take(self, part: LinearModule) -> None:
        """The part's weights are complete: hand them over to the provider that multiplies with them from now on."""
        matrices = part.matrices()
        for provider in self._providers(part):
            methods = self._prepare(part, provider, matrices)
            if methods is not None:
                self._install(part, methods, provider.name)
                return
        self.counts["torch"] += 1

    def take_stored(self, part: LinearModule, pieces: Mapping[int, Mapping[int, QuantizedMatrix]]) -> None:
        """The same for a part that the checkpoint stores quantized. pieces: by matrix, by first output."""
        methods = []
        for index, matrix in enumerate(part.matrices()):
            stored = [piece for _, piece in sorted(pieces.get(index, {}).items())]
            if sum(piece.weight.shape[0] for piece in stored) != matrix.weight.shape[0]:
                raise UsageError(
                    f"{self._name(part)} is quantized in part only, which cannot be loaded.",
                    hint="Use the model's version in 16 bits with --quantization int8 or int4.",
                    code="unsupported_quantization",
                )
            methods.append(stored_method(stored, matrix.bias, kernels=self.kernels))
        self._install(part, methods, kernel_name(self.held.layers, kernels=self.kernels))

    def take_kept(self, part: LinearModule, methods: Sequence[LinearMethod]) -> None:
        """These products were made of the part's weights before."""
        self._install(part, methods, kernel_name(self._held(part), kernels=True))

    def _name(self, part: LinearModule) -> str:
        return next(name for name, candidate in parts_of(self.model) if candidate is part)

    def _prepare(
        self, part: LinearModule, provider: LinearProvider, matrices: Sequence[WeightMatrix]
    ) -> list[LinearMethod] | None:
        """One product for each matrix; None if the provider declines any."""
        methods = []
        try:
            for matrix in matrices:
                method = provider.prepare(matrix.weight, matrix.bias)
                if method is None:
                    return None
                methods.append(method)
        except UsageError as problem:
            raise UsageError(
                f"{self._name(part)}: {problem.message}", hint=problem.hint, code="bad_weights"
            ) from problem
        return methods

    def _install(self, part: LinearModule, methods: Sequence[LinearMethod], name: str) -> None:
        self.memory_bytes += sum(map(_bytes_of, part.matrices(), methods))
        self.installed.append((part, methods))
        part.install(methods, name)
        is_tied_head = part is self.model.head and self.model.spec.tie_embeddings
        if is_tied_head and isinstance(methods[0], Bf16LinearMethod):
            self.model.embedding.share(methods[0].packed)  # one copy serves both
        self.counts[name] += 1

    def _providers(self, part: LinearModule) -> list[LinearProvider]:
        model = self.model
        if model.embedding.weight.device.type != "cpu":
            return []
        held = self._held(part)
        # What a quantized checkpoint leaves in 16 bits stays so, but for the head.
        if part is not model.head and model.spec.weight_format is not None:
            held = "none"
        if held != "none":
            return [QuantizedProvider(held, group_size=self.held.group_size, kernels=self.kernels)]
        tied = model.embedding.weight if model.spec.tie_embeddings else None
        found: list[LinearProvider] = [Bf16Provider()] if self.kernels and Bf16Provider.is_available() else []
        return found + ([OneDnnProvider(keep=tied)] if OneDnnProvider.is_available() else [])

    def _held(self, part: LinearModule) -> Held:
        """What this part's matrices are held in."""
        if part is self.model.head:
            return self.held.head
        return "none" if id(part) in self._routers else self.held.layers


def _bytes_of(matrix: WeightMatrix, method: LinearMethod) -> int:
    """Bytes of what a product holds; of a product without `tensors`, as many as the weight had."""
    tensors = tensors_of(method)
    return sum(tensor.nbytes for tensor in tensors.values()) if tensors else matrix.weight.nbytes


def parts_of(model: Model) -> list[tuple[str, LinearModule]]:
    """Every part with its name, the head of tied embeddings included."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Linear | Experts)]
