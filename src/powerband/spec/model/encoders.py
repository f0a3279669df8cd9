"""Encoders: models that see a text in both directions, which embed and classify but do not generate.

What a key means, and the value it has when absent, is as in transformers' `configuration_<family>.py` (5.24).
"""

from __future__ import annotations

from dataclasses import replace

from powerband.spec.config_reader import MAX_LAYERS, MAX_POSITIONS, ConfigReader, shown
from powerband.spec.model.family_keys import Defaults, shared_arguments
from powerband.spec.model.model_spec import EncoderSpec, LayerSpec, ModelSpec

_BERT = Defaults(
    vocab_size=30_522,
    hidden_size=768,
    intermediate_size=3072,
    num_heads=12,
    max_position=512,
    activation="gelu",
    tie_embeddings=True,
)


def read_bert(fields: ConfigReader) -> ModelSpec:
    return _encoder(fields, _BERT, num_types=2, position_offset=0)


def read_roberta(fields: ConfigReader) -> ModelSpec:
    """RoBERTa and XLM-RoBERTa: as BERT, but the first position is the one after that of padding."""
    padding = fields.integer("pad_token_id", 1, low=0, high=1 << 20)
    return _encoder(fields, replace(_BERT, vocab_size=50_265), num_types=2, position_offset=padding + 1)


def _encoder(fields: ConfigReader, defaults: Defaults, *, num_types: int, position_offset: int) -> ModelSpec:
    kind = fields.text("position_embedding_type", "absolute")
    if kind != "absolute":
        raise fields.error(f"positions of type {shown(kind)} are not supported", "position_embedding_type")
    if fields.boolean("is_decoder", False) or fields.boolean("add_cross_attention", False):
        raise fields.error("it is a decoder", "is_decoder")
    shared = shared_arguments(fields, defaults)
    num_positions = shared["max_position"]
    if num_positions <= position_offset:
        raise fields.error(f"{num_positions} positions leave none for a text", "max_position_embeddings")
    shared |= {
        "family": fields.values["model_type"],
        "norm_eps": fields.number("layer_norm_eps", 1e-12, high=1.0),
        "max_position": num_positions - position_offset,
        "tie_embeddings": True,
    }
    num_layers = fields.integer("num_hidden_layers", 12, high=MAX_LAYERS)
    return ModelSpec(
        **shared,
        layers=(LayerSpec(None, None),) * num_layers,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        norm_placement="post",
        generates=False,
        encoder=EncoderSpec(
            num_positions=num_positions,
            position_offset=position_offset,
            num_types=fields.integer("type_vocab_size", num_types, high=MAX_POSITIONS),
        ),
    )
