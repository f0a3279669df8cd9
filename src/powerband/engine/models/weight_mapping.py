"""Where each tensor of a checkpoint goes: a slot is a view of our parameters and the checkpoint tensors that fill it.

checkpoint                                    parameter              slot target
model.layers.0.self_attn.q_proj.weight   ┐                           weight[:q]
model.layers.0.self_attn.k_proj.weight   ├─►  layers.0.attention.qkv weight[q:q+kv]
model.layers.0.self_attn.v_proj.weight   ┘                           weight[q+kv:]
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch

from powerband.engine.layers.experts import Experts
from powerband.engine.layers.mlp import GatedMLP
from powerband.engine.linear.base import Linear
from powerband.engine.models.decoder import Attention, Decoder, DecoderLayer

Convert = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """`target` receives the one tensor of `sources`, or what `convert` makes of all of them."""

    sources: tuple[str, ...]
    target: torch.Tensor
    convert: Convert | None = None


@dataclass(frozen=True, slots=True)
class CheckpointNames:
    """A family's names for its tensors. A name that the family lacks is never looked up."""

    norms: tuple[tuple[str, str], ...]  # (our attribute of a layer, the checkpoint's)
    fused_qkv: bool = False
    fused_gate_up: bool = False
    mlp: str = "mlp"


def plain_slots(model: Decoder, names: CheckpointNames) -> Iterator[WeightSlot]:
    """Everything but experts, as nearly all families name it."""
    offset = model.spec.norm_weight_offset
    yield WeightSlot(("model.embed_tokens.weight",), model.embedding.weight)
    yield _norm_slot("model.norm.weight", model.norm.weight, offset)
    if not model.spec.tie_embeddings:
        yield WeightSlot(("lm_head.weight",), model.head.weight)
    for index, layer in enumerate(layers_of(model)):
        base = f"model.layers.{index}."
        for ours, theirs in names.norms:
            yield _norm_slot(f"{base}{theirs}.weight", getattr(layer, ours).weight, offset)
        yield from _attention_slots(layer.attention, f"{base}self_attn.", names.fused_qkv, offset)
        if isinstance(layer.mlp, GatedMLP):
            yield from _mlp_slots(layer.mlp, f"{base}{names.mlp}.", names.fused_gate_up)


def layers_of(model: Decoder) -> Iterator[DecoderLayer]:
    yield from cast("Iterable[DecoderLayer]", model.layers)


def _attention_slots(attention: Attention, base: str, fused: bool, offset: float) -> Iterator[WeightSlot]:
    q_size = attention.num_heads * attention.head_dim
    kv_size = attention.num_kv_heads * attention.head_dim
    if fused:
        yield from _linear_slots(attention.qkv, f"{base}qkv_proj")
    else:
        yield from _split_slots(attention.qkv, base, {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size})
    yield from _linear_slots(attention.output, f"{base}o_proj")
    if attention.sinks is not None:
        yield WeightSlot((f"{base}sinks",), attention.sinks)
    if attention.q_norm is not None and attention.k_norm is not None:
        yield _norm_slot(f"{base}q_norm.weight", attention.q_norm.weight, offset)
        yield _norm_slot(f"{base}k_norm.weight", attention.k_norm.weight, offset)
    if attention.head_norm is not None:
        heads = attention.num_heads
        yield _head_norm_slot(f"{base}q_norm.weight", attention.head_norm[:heads], offset)
        yield _head_norm_slot(f"{base}k_norm.weight", attention.head_norm[heads:], offset)


def _mlp_slots(mlp: GatedMLP, base: str, fused: bool) -> Iterator[WeightSlot]:
    if fused:
        yield from _linear_slots(mlp.gate_up, f"{base}gate_up_proj")
    else:
        half = mlp.gate_up.weight.shape[0] // 2
        yield from _split_slots(mlp.gate_up, base, {"gate_proj": half, "up_proj": half})
    yield from _linear_slots(mlp.down, f"{base}down_proj")


def _linear_slots(linear: Linear, base: str) -> Iterator[WeightSlot]:
    yield WeightSlot((f"{base}.weight",), linear.weight)
    if linear.bias is not None:
        yield WeightSlot((f"{base}.bias",), linear.bias)


def _split_slots(linear: Linear, base: str, sizes: dict[str, int]) -> Iterator[WeightSlot]:
    """Several checkpoint projections, one below the other in ours."""
    start = 0
    for name, size in sizes.items():
        yield WeightSlot((f"{base}{name}.weight",), linear.weight[start : start + size])
        if linear.bias is not None:
            yield WeightSlot((f"{base}{name}.bias",), linear.bias[start : start + size])
        start += size


def _norm_slot(name: str, target: torch.Tensor, offset: float) -> WeightSlot:
    return WeightSlot((name,), target, (lambda stored: stored.float() + offset) if offset else None)


def _head_norm_slot(name: str, target: torch.Tensor, offset: float) -> WeightSlot:
    """One weight per dimension of a head, the same for every head."""
    heads = target.shape[0]
    return WeightSlot((name,), target, lambda stored: (stored.float() + offset if offset else stored).expand(heads, -1))


# ---- experts


def expert_slots(
    model: Decoder, names: Collection[str], *, blocks: tuple[str, ...], parts: tuple[str, str, str]
) -> Iterator[WeightSlot]:
    """Router and experts, one tensor per expert or all in one, whichever `names` holds.

    blocks: what the checkpoint may call the block of experts. parts: its names for gate, down and up.
    """
    for index, layer in enumerate(layers_of(model)):
        if not isinstance(layer.mlp, Experts):
            continue
        bases = [f"model.layers.{index}.{block}." for block in blocks]
        base = next((b for b in bases if f"{b}gate.weight" in names), bases[0])
        yield from _linear_slots(layer.mlp.router, f"{base}gate")
        if f"{base}experts.gate_up_proj" in names:
            yield WeightSlot((f"{base}experts.gate_up_proj",), layer.mlp.gate_up)
            yield WeightSlot((f"{base}experts.down_proj",), layer.mlp.down)
            continue
        inner = layer.mlp.down.shape[2]
        gate, down, up = parts
        for expert in range(layer.mlp.down.shape[0]):
            one = f"{base}experts.{expert}."
            yield WeightSlot((f"{one}{gate}.weight",), layer.mlp.gate_up[expert, :inner])
            yield WeightSlot((f"{one}{up}.weight",), layer.mlp.gate_up[expert, inner:])
            yield WeightSlot((f"{one}{down}.weight",), layer.mlp.down[expert])
