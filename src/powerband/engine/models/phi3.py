"""Phi-3: q, k and v in one tensor, gate and up in one, in our own order."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from powerband.engine.models.decoder import Decoder
from powerband.engine.models.weight_mapping import CheckpointNames, WeightSlot, plain_slots

NAMES = CheckpointNames(
    norms=(("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")),
    fused_qkv=True,
    fused_gate_up=True,
)


def slots(model: Decoder, _names: Collection[str]) -> Iterator[WeightSlot]:
    return plain_slots(model, NAMES)
