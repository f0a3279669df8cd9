"""Gemma 2 and 3: norms before and after attention and MLP, stored as weight - 1."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from powerband.engine.models.decoder import Decoder
from powerband.engine.models.weight_mapping import CheckpointNames, WeightSlot, plain_slots

NAMES = CheckpointNames(
    norms=(
        ("attention_norm", "input_layernorm"),
        ("attention_post_norm", "post_attention_layernorm"),
        ("mlp_norm", "pre_feedforward_layernorm"),
        ("mlp_post_norm", "post_feedforward_layernorm"),
    )
)


def slots(model: Decoder, _names: Collection[str]) -> Iterator[WeightSlot]:
    return plain_slots(model, NAMES)
