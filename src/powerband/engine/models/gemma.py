"""Gemma 2 and 3: norms before and after attention and MLP, stored as weight - 1."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from powerband.engine.models.decoder import Decoder
from powerband.engine.models.slots import Names, Slot, plain_slots

NAMES = Names(
    norms=(
        ("attention_norm", "input_layernorm"),
        ("attention_post_norm", "post_attention_layernorm"),
        ("mlp_norm", "pre_feedforward_layernorm"),
        ("mlp_post_norm", "post_feedforward_layernorm"),
    )
)
# Where the text model lies: alone, and inside a multimodal Gemma 3 as transformers 4 and 5 write it.
PREFIXES = ("model.", "language_model.model.", "model.language_model.")


def slots(model: Decoder, names: Collection[str]) -> Iterator[Slot]:
    prefix = next((prefix for prefix in PREFIXES if f"{prefix}embed_tokens.weight" in names), PREFIXES[0])
    return plain_slots(model, NAMES, prefix)
