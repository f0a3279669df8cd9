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
from powerband.engine.linear.base import Linear, LinearProvider, Matrix, Product, Projections
from powerband.engine.linear.bf16 import PackedBf16, PackedProduct
from powerband.engine.linear.onednn import PackedLinear
from powerband.engine.linear.quantized import (
    QuantizedLinear,
    StoredMatrix,
    kernel_name,
    stored_product,
    tensors_of,
)
from powerband.engine.models.decoder import Decoder
from powerband.errors import UsageError
from powerband.spec.checkpoint.quantization import PLAIN, Held, WeightPrecisions


class LinearMethodSelector:
    """Gives every part of a model that multiplies with matrices its products, as soon as those are loaded."""

    def __init__(self, model: Decoder, held: WeightPrecisions = PLAIN, *, kernels: bool = False) -> None:
        self.model = model
        self.held = held
        self.kernels = kernels  # the C++ kernels may be used
        self.counts: Counter[str] = Counter()  # parts by who computes them
        self.memory_bytes = 0  # of matrices that are not parameters any more
        self.installed: list[tuple[Projections, Sequence[Product]]] = []
        self._routers = {id(module.router) for module in model.modules() if isinstance(module, Experts)}

    def take(self, part: Projections) -> None:
        """The part's weights are complete: hand them over to the provider that multiplies with them from now on."""
        matrices = part.matrices()
        for provider in self._providers(part):
            products = self._prepare(part, provider, matrices)
            if products is not None:
                self._install(part, products, provider.name)
                return
        self.counts["torch"] += 1

    def take_stored(self, part: Projections, pieces: Mapping[int, Mapping[int, StoredMatrix]]) -> None:
        """The same for a part that the checkpoint stores quantized. pieces: by matrix, by first output."""
        products = []
        for index, matrix in enumerate(part.matrices()):
            stored = [piece for _, piece in sorted(pieces.get(index, {}).items())]
            if sum(piece.weight.shape[0] for piece in stored) != matrix.weight.shape[0]:
                raise UsageError(
                    f"{self._name(part)} is quantized in part only, which cannot be loaded.",
                    hint="Use the model's version in 16 bits with --quantization int8 or int4.",
                    code="unsupported_quantization",
                )
            products.append(stored_product(stored, matrix.bias, kernels=self.kernels))
        self._install(part, products, kernel_name(self.held.layers, kernels=self.kernels))

    def take_kept(self, part: Projections, products: Sequence[Product]) -> None:
        """These products were made of the part's weights before."""
        self._install(part, products, kernel_name(self._held(part), kernels=True))

    def _name(self, part: Projections) -> str:
        return next(name for name, candidate in parts_of(self.model) if candidate is part)

    def _prepare(self, part: Projections, provider: LinearProvider, matrices: Sequence[Matrix]) -> list[Product] | None:
        """One product for each matrix; None if the provider declines any."""
        products = []
        try:
            for matrix in matrices:
                product = provider.prepare(matrix.weight, matrix.bias)
                if product is None:
                    return None
                products.append(product)
        except UsageError as problem:
            raise UsageError(
                f"{self._name(part)}: {problem.message}", hint=problem.hint, code="bad_weights"
            ) from problem
        return products

    def _install(self, part: Projections, products: Sequence[Product], name: str) -> None:
        self.memory_bytes += sum(map(_bytes_of, part.matrices(), products))
        self.installed.append((part, products))
        part.install(products, name)
        if part is self.model.head and self.model.spec.tie_embeddings and isinstance(products[0], PackedProduct):
            self.model.embedding.share(products[0].packed)  # one copy serves both
        self.counts[name] += 1

    def _providers(self, part: Projections) -> list[LinearProvider]:
        model = self.model
        if model.embedding.weight.device.type != "cpu":
            return []
        held = self._held(part)
        # What a quantized checkpoint leaves in 16 bits stays so, but for the head.
        if part is not model.head and model.spec.weight_format is not None:
            held = "none"
        if held != "none":
            return [QuantizedLinear(held, group_size=self.held.group_size, kernels=self.kernels)]
        tied = model.embedding.weight if model.spec.tie_embeddings else None
        found: list[LinearProvider] = [PackedBf16()] if self.kernels and PackedBf16.is_available() else []
        return found + ([PackedLinear(keep=tied)] if PackedLinear.is_available() else [])

    def _held(self, part: Projections) -> Held:
        """What this part's matrices are held in."""
        if part is self.model.head:
            return self.held.head
        return "none" if id(part) in self._routers else self.held.layers


def _bytes_of(matrix: Matrix, product: Product) -> int:
    """Bytes of what a product holds; of a product without `tensors`, as many as the weight had."""
    tensors = tensors_of(product)
    return sum(tensor.nbytes for tensor in tensors.values()) if tensors else matrix.weight.nbytes


def parts_of(model: Decoder) -> list[tuple[str, Projections]]:
    """Every part with its name, the head of tied embeddings included."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Linear | Experts)]
