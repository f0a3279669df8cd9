"""One short function per family: from the keys of its config.json to a ModelSpec.

What a key means, and the value it has when absent, is as in transformers' `configuration_<family>.py` (5.23).
Adding a family: write its function here, give it a row in FAMILIES, and a shape in tests/spec/test_counts.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from powerband.spec.config_reader import MAX_LAYERS, ConfigReader
from powerband.spec.model.encoders import read_bert, read_roberta
from powerband.spec.model.family_keys import (
    Defaults,
    check_layer_types,
    experts_per_token,
    mixed_layers,
    one_rope,
    read_num_experts,
    read_num_layers,
    same_layers,
    shared_arguments,
    soft_cap,
)
from powerband.spec.model.model_spec import LayerSpec, ModelSpec, RopeSpec
from powerband.spec.model.rope import rope_from_table


def _llama(fields: ConfigReader) -> ModelSpec:
    shared = shared_arguments(fields, Defaults(bos=1, eos=2))
    bias = fields.boolean("attention_bias", False)
    return ModelSpec(
        **shared,
        layers=same_layers(fields, None, one_rope(fields, shared)),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=fields.boolean("mlp_bias", False),
    )


def _mistral(fields: ConfigReader) -> ModelSpec:
    shared = shared_arguments(fields, Defaults(num_kv_heads=8, max_position=131_072, bos=1, eos=2))
    window = fields.nullable_integer("sliding_window", 4096)
    return ModelSpec(**shared, layers=same_layers(fields, window, one_rope(fields, shared)))


def _qwen2(fields: ConfigReader) -> ModelSpec:
    shared = shared_arguments(fields, Defaults(num_kv_heads=32, max_position=32_768))
    rope = one_rope(fields, shared)
    return ModelSpec(**shared, layers=_qwen_layers(fields, rope), qkv_bias=True)


def _qwen3(fields: ConfigReader) -> ModelSpec:
    shared = shared_arguments(fields, Defaults(num_kv_heads=32, head_dim=128, max_position=32_768))
    rope = one_rope(fields, shared)
    bias = fields.boolean("attention_bias", False)
    return ModelSpec(**shared, layers=_qwen_layers(fields, rope), qkv_bias=bias, output_bias=bias, qk_norm="head")


def _qwen_layers(fields: ConfigReader, rope: RopeSpec) -> tuple[LayerSpec, ...]:
    """The first `max_window_layers` layers see everything, the others a window, and only if windows are on."""
    window = fields.nullable_integer("sliding_window", 4096) if fields.boolean("use_sliding_window", False) else None
    first = fields.integer("max_window_layers", 28, low=0)
    local = [window is not None and i >= first for i in range(read_num_layers(fields))]
    return mixed_layers(fields, window, local, rope, rope)


def _gemma2(fields: ConfigReader) -> ModelSpec:
    shared = shared_arguments(fields, _GEMMA, query_scale=True)
    rope = one_rope(fields, shared)
    local = [i % 2 == 0 for i in range(read_num_layers(fields))]
    return ModelSpec(
        **shared,
        layers=mixed_layers(fields, fields.nullable_integer("sliding_window", 4096), local, rope, rope),
        **_gemma_arguments(fields, shared["hidden_size"]),
        attention_softcap=soft_cap(fields, "attn_logit_softcapping", 50.0),
        logit_softcap=soft_cap(fields, "final_logit_softcapping", 30.0),
    )


def _gemma3(fields: ConfigReader) -> ModelSpec:
    shared = shared_arguments(fields, _GEMMA3, query_scale=True)
    if fields.boolean("use_bidirectional_attention", False):
        raise fields.error("it attends in both directions, as encoders do", "use_bidirectional_attention")
    num_layers = fields.integer("num_hidden_layers", _GEMMA3.num_layers, high=MAX_LAYERS)
    period = fields.integer("sliding_window_pattern", 6)
    local = [(i + 1) % period != 0 for i in range(num_layers)]
    local_rope, global_rope = _gemma3_ropes(fields, shared)
    return ModelSpec(
        **shared,
        layers=mixed_layers(fields, fields.nullable_integer("sliding_window", 4096), local, local_rope, global_rope),
        **_gemma_arguments(fields, shared["hidden_size"]),
        qk_norm="head",
        attention_softcap=soft_cap(fields, "attn_logit_softcapping", None),
        logit_softcap=soft_cap(fields, "final_logit_softcapping", None),
    )


_GEMMA = Defaults(
    num_kv_heads=4,
    head_dim=256,
    max_position=8192,
    activation_key="hidden_activation",
    activation="gelu_pytorch_tanh",
    tie_embeddings=True,
    bos=2,
    eos=1,
)
# The text_config inside a multimodal Gemma 3 leaves out what equals these sizes.
_GEMMA3 = Defaults(
    vocab_size=262_208,
    hidden_size=2304,
    intermediate_size=9216,
    num_layers=26,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    max_position=131_072,
    activation_key="hidden_activation",
    activation="gelu_pytorch_tanh",
    tie_embeddings=True,
    bos=2,
    eos=1,
)


def _gemma_arguments(fields: ConfigReader, hidden_size: int) -> dict[str, Any]:
    bias = fields.boolean("attention_bias", False)
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "norm_placement": "both",
        "norm_weight_offset": 1.0,
        "embedding_scale": hidden_size**0.5,
    }


def _gemma3_ropes(fields: ConfigReader, shared: dict[str, Any]) -> tuple[RopeSpec, RopeSpec]:
    """(local, global). Scaling applies to global layers; local ones turn with a base frequency of their own."""
    both = fields.table("rope_parameters") or ConfigReader({}, fields.source)
    local = both.table("sliding_attention") or ConfigReader({}, fields.source)
    everywhere = both.table("full_attention") or ConfigReader({}, fields.source)
    scaling = fields.table("rope_scaling")
    if scaling is not None:
        everywhere = ConfigReader({**everywhere.values, **scaling.values}, scaling.source)
    global_theta = everywhere.number("rope_theta", fields.number("rope_theta", 1_000_000.0, low=1.0), low=1.0)
    size = shared["head_dim"], shared["max_position"]
    local_theta = local.number("rope_theta", fields.number("rope_local_base_freq", 10_000.0, low=1.0), low=1.0)
    return (
        rope_from_table(fields, local, *size, theta=local_theta),
        rope_from_table(fields, everywhere, *size, theta=global_theta),
    )


def _phi3(fields: ConfigReader) -> ModelSpec:
    shared = shared_arguments(fields, Defaults(max_position=4096, norm_eps=1e-5, bos=1, eos=32_000))
    window = fields.optional_integer("sliding_window")
    return ModelSpec(**shared, layers=same_layers(fields, window, one_rope(fields, shared)))


def _olmo2(fields: ConfigReader) -> ModelSpec:
    shared = shared_arguments(fields, Defaults(norm_eps=1e-5, eos=50_279))
    bias = fields.boolean("attention_bias", False)
    return ModelSpec(
        **shared,
        layers=same_layers(fields, None, one_rope(fields, shared)),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="full",
        norm_placement="post",
    )


def _gpt_oss(fields: ConfigReader) -> ModelSpec:
    shared = shared_arguments(fields, Defaults(num_kv_heads=8, head_dim=64, max_position=131_072, norm_eps=1e-5))
    for name, value in (("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
        if fields.number(name, value) != value:
            raise fields.error(f"'{name}' other than {value} is not supported ({fields.values[name]})", name)
    if fields.table("rope_scaling") is None and "rope_parameters" not in fields:
        yarn = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
        fields = ConfigReader({**fields.values, "rope_scaling": yarn}, fields.source)
    rope = one_rope(fields, shared, default_theta=150_000.0)
    local = [i % 2 == 0 for i in range(read_num_layers(fields))]
    window = fields.nullable_integer("sliding_window", 128)
    bias = fields.boolean("attention_bias", True)
    num_experts = read_num_experts(fields, 128)
    return ModelSpec(
        **shared,
        layers=mixed_layers(fields, window, local, rope, rope, num_experts),
        qkv_bias=bias,
        output_bias=bias,
        attention_sinks=True,
        num_experts_per_token=experts_per_token(fields, 4, num_experts),
        expert_intermediate_size=shared["intermediate_size"],
        router_bias=True,
        expert_bias=True,
        expert_activation="gpt_oss",
    )


def _mixtral(fields: ConfigReader) -> ModelSpec:
    shared = shared_arguments(fields, Defaults(num_kv_heads=8, max_position=131_072, norm_eps=1e-5, bos=1, eos=2))
    num_experts = read_num_experts(fields, 8)
    rope = one_rope(fields, shared, default_theta=1_000_000.0)
    return ModelSpec(
        **shared,
        layers=same_layers(fields, fields.optional_integer("sliding_window"), rope, num_experts),
        num_experts_per_token=experts_per_token(fields, 2, num_experts),
        expert_intermediate_size=shared["intermediate_size"],
    )


def _qwen3_moe(fields: ConfigReader) -> ModelSpec:
    shared = shared_arguments(fields, Defaults(num_kv_heads=4, max_position=32_768))
    window = fields.nullable_integer("sliding_window", 4096) if fields.boolean("use_sliding_window", False) else None
    rope = one_rope(fields, shared)
    bias = fields.boolean("attention_bias", False)
    num_experts = read_num_experts(fields, 128)
    check_layer_types(fields, window)
    every = fields.integer("decoder_sparse_step", 1)
    dense = frozenset(fields.integers("mlp_only_layers"))
    return ModelSpec(
        **shared,
        layers=tuple(
            LayerSpec(window, rope, num_experts if i not in dense and (i + 1) % every == 0 else 0)
            for i in range(read_num_layers(fields))
        ),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="head",
        num_experts_per_token=experts_per_token(fields, 8, num_experts),
        expert_intermediate_size=fields.integer("moe_intermediate_size", 768),
        norm_topk_prob=fields.boolean("norm_topk_prob", False),
    )


FAMILIES: dict[str, Callable[[ConfigReader], ModelSpec]] = {
    # by model_type
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "gpt_oss": _gpt_oss,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "bert": read_bert,
    "roberta": read_roberta,
    "xlm-roberta": read_roberta,
}
