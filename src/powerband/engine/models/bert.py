"""BERT, RoBERTa and XLM-RoBERTa: the same tensors under the same names, behind the family's prefix or without it."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from powerband.engine.linear.base import Linear
from powerband.engine.models.encoder import Encoder, LayerNorm
from powerband.engine.models.weight_mapping import WeightSlot

_PREFIXES = ("bert.", "roberta.", "")


def slots(model: Encoder, names: Collection[str]) -> Iterator[WeightSlot]:
    words = "embeddings.word_embeddings.weight"
    prefix = next((prefix for prefix in _PREFIXES if f"{prefix}{words}" in names), "")
    base = f"{prefix}embeddings."
    yield WeightSlot((f"{prefix}{words}",), model.embedding.weight)
    yield WeightSlot((f"{base}position_embeddings.weight",), model.positions.weight)
    yield WeightSlot((f"{base}token_type_embeddings.weight",), model.types.weight)
    yield from _norm(model.embedding_norm, f"{base}LayerNorm", names)
    size = model.spec.hidden_size
    for index, layer in enumerate(model.every_layer()):
        base = f"{prefix}encoder.layer.{index}."
        for row, name in enumerate(("query", "key", "value")):
            yield from _linear(layer.qkv, f"{base}attention.self.{name}", row * size, size)
        yield from _linear(layer.output, f"{base}attention.output.dense", 0, size)
        yield from _norm(layer.attention_norm, f"{base}attention.output.LayerNorm", names)
        yield from _linear(layer.up, f"{base}intermediate.dense", 0, model.spec.intermediate_size)
        yield from _linear(layer.down, f"{base}output.dense", 0, size)
        yield from _norm(layer.mlp_norm, f"{base}output.LayerNorm", names)


def _linear(linear: Linear, name: str, first: int, count: int) -> Iterator[WeightSlot]:
    yield WeightSlot((f"{name}.weight",), linear.weight[first : first + count])
    if linear.bias is not None:
        yield WeightSlot((f"{name}.bias",), linear.bias[first : first + count])


def _norm(norm: LayerNorm, name: str, names: Collection[str]) -> Iterator[WeightSlot]:
    """The first checkpoints call weight and bias gamma and beta."""
    is_old = f"{name}.gamma" in names
    yield WeightSlot((f"{name}.{'gamma' if is_old else 'weight'}",), norm.weight)
    yield WeightSlot((f"{name}.{'beta' if is_old else 'bias'}",), norm.bias)
