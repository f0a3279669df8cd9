"""Llama, Mistral, Qwen2 and Qwen3: the names that most other families vary."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from powerband.engine.models.decoder import Decoder
from powerband.engine.models.weight_mapping import CheckpointNames, WeightSlot, plain_slots

NAMES = CheckpointNames(norms=(("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")))


def slots(model: Decoder, _names: Collection[str]) -> Iterator[WeightSlot]:
    return plain_slots(model, NAMES)
