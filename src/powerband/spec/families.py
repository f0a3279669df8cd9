"""One short function per family: from the keys of its config.json to a ModelSpec.

What a key means, and the value it has when absent, is as in transformers' `configuration_<family>.py` (5.23).
Adding a family: write its function here, give it a row in FAMILIES, and a shape in tests/spec/test_counts.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from powerband.spec.fields import MAX_LAYERS, MAX_POSITIONS, MAX_VOCABULARY, Fields, shown
from powerband.spec.model import LayerSpec, ModelSpec, RopeSpec
from powerband.spec.rope import read_rope, rope_from_table

_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh", "gelu"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class _Defaults:
    """What differs between families in the keys that they share. A required size is 0."""

    vocab_size: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    num_layers: int = 0
    num_heads: int = 0
    num_kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: hidden_size / num_heads
    max_position: int = 2048
    norm_eps: float = 1e-6
    activation_key: str = "hidden_act"
    activation: str = "silu"
    tie_embeddings: bool = False
    bos: int | None = None
    eos: int | None = None


def _llama(fields: Fields) -> ModelSpec:
    shared = _shared(fields, _Defaults(bos=1, eos=2))
    bias = fields.boolean("attention_bias", False)
    return ModelSpec(
        **shared,
        layers=_same_layers(fields, None, _rope(fields, shared)),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=fields.boolean("mlp_bias", False),
    )


def _mistral(fields: Fields) -> ModelSpec:
    shared = _shared(fields, _Defaults(num_kv_heads=8, max_position=131_072, bos=1, eos=2))
    window = fields.nullable_integer("sliding_window", 4096)
    return ModelSpec(**shared, layers=_same_layers(fields, window, _rope(fields, shared)))


def _qwen2(fields: Fields) -> ModelSpec:
    shared = _shared(fields, _Defaults(num_kv_heads=32, max_position=32_768))
    rope = _rope(fields, shared)
    return ModelSpec(**shared, layers=_qwen_layers(fields, rope), qkv_bias=True)


def _qwen3(fields: Fields) -> ModelSpec:
    shared = _shared(fields, _Defaults(num_kv_heads=32, head_dim=128, max_position=32_768))
    rope = _rope(fields, shared)
    bias = fields.boolean("attention_bias", False)
    return ModelSpec(**shared, layers=_qwen_layers(fields, rope), qkv_bias=bias, output_bias=bias, qk_norm="head")


def _qwen_layers(fields: Fields, rope: RopeSpec) -> tuple[LayerSpec, ...]:
    """The first `max_window_layers` layers see everything, the others a window, and only if windows are on."""
    window = fields.nullable_integer("sliding_window", 4096) if fields.boolean("use_sliding_window", False) else None
    first = fields.integer("max_window_layers", 28, low=0)
    local = [window is not None and i >= first for i in range(_num_layers(fields))]
    return _mixed_layers(fields, window, local, rope, rope)


def _gemma2(fields: Fields) -> ModelSpec:
    shared = _shared(fields, _GEMMA, query_scale=True)
    rope = _rope(fields, shared)
    local = [i % 2 == 0 for i in range(_num_layers(fields))]
    return ModelSpec(
        **shared,
        layers=_mixed_layers(fields, fields.nullable_integer("sliding_window", 4096), local, rope, rope),
        **_gemma_ways(fields, shared["hidden_size"]),
        attention_softcap=_soft_cap(fields, "attn_logit_softcapping", 50.0),
        logit_softcap=_soft_cap(fields, "final_logit_softcapping", 30.0),
    )


def _gemma3(fields: Fields) -> ModelSpec:
    shared = _shared(fields, _GEMMA3, query_scale=True)
    if fields.boolean("use_bidirectional_attention", False):
        raise fields.error("it attends in both directions, as encoders do", "use_bidirectional_attention")
    num_layers = fields.integer("num_hidden_layers", _GEMMA3.num_layers, high=MAX_LAYERS)
    period = fields.integer("sliding_window_pattern", 6)
    local = [(i + 1) % period != 0 for i in range(num_layers)]
    local_rope, global_rope = _gemma3_ropes(fields, shared)
    return ModelSpec(
        **shared,
        layers=_mixed_layers(fields, fields.nullable_integer("sliding_window", 4096), local, local_rope, global_rope),
        **_gemma_ways(fields, shared["hidden_size"]),
        qk_norm="head",
        attention_softcap=_soft_cap(fields, "attn_logit_softcapping", None),
        logit_softcap=_soft_cap(fields, "final_logit_softcapping", None),
    )


_GEMMA = _Defaults(
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
_GEMMA3 = _Defaults(
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


def _gemma_ways(fields: Fields, hidden_size: int) -> dict[str, Any]:
    bias = fields.boolean("attention_bias", False)
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "norm_placement": "both",
        "norm_weight_offset": 1.0,
        "embedding_scale": hidden_size**0.5,
    }


def _gemma3_ropes(fields: Fields, shared: dict[str, Any]) -> tuple[RopeSpec, RopeSpec]:
    """(local, global). Scaling applies to global layers; local ones turn with a base frequency of their own."""
    both = fields.table("rope_parameters") or Fields({}, fields.source)
    local = both.table("sliding_attention") or Fields({}, fields.source)
    everywhere = both.table("full_attention") or Fields({}, fields.source)
    scaling = fields.table("rope_scaling")
    if scaling is not None:
        everywhere = Fields({**everywhere.values, **scaling.values}, scaling.source)
    global_theta = everywhere.number("rope_theta", fields.number("rope_theta", 1_000_000.0, low=1.0), low=1.0)
    size = shared["head_dim"], shared["max_position"]
    local_theta = local.number("rope_theta", fields.number("rope_local_base_freq", 10_000.0, low=1.0), low=1.0)
    return (
        rope_from_table(fields, local, *size, theta=local_theta),
        rope_from_table(fields, everywhere, *size, theta=global_theta),
    )


def _phi3(fields: Fields) -> ModelSpec:
    shared = _shared(fields, _Defaults(max_position=4096, norm_eps=1e-5, bos=1, eos=32_000))
    window = fields.optional_integer("sliding_window")
    return ModelSpec(**shared, layers=_same_layers(fields, window, _rope(fields, shared)))


def _olmo2(fields: Fields) -> ModelSpec:
    shared = _shared(fields, _Defaults(norm_eps=1e-5, eos=50_279))
    bias = fields.boolean("attention_bias", False)
    return ModelSpec(
        **shared,
        layers=_same_layers(fields, None, _rope(fields, shared)),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="full",
        norm_placement="post",
    )


def _gpt_oss(fields: Fields) -> ModelSpec:
    shared = _shared(fields, _Defaults(num_kv_heads=8, head_dim=64, max_position=131_072, norm_eps=1e-5))
    for name, value in (("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
        if fields.number(name, value) != value:
            raise fields.error(f"'{name}' other than {value} is not supported ({fields.values[name]})", name)
    if "rope_scaling" not in fields and "rope_parameters" not in fields:
        yarn = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
        fields = Fields({**fields.values, "rope_scaling": yarn}, fields.source)
    rope = _rope(fields, shared, default_theta=150_000.0)
    local = [i % 2 == 0 for i in range(_num_layers(fields))]
    window = fields.nullable_integer("sliding_window", 128)
    bias = fields.boolean("attention_bias", True)
    num_experts = _num_experts(fields, 128)
    return ModelSpec(
        **shared,
        layers=_mixed_layers(fields, window, local, rope, rope, num_experts),
        qkv_bias=bias,
        output_bias=bias,
        attention_sinks=True,
        num_experts_per_token=_experts_per_token(fields, 4, num_experts),
        expert_intermediate_size=shared["intermediate_size"],
        router_bias=True,
        expert_bias=True,
        expert_activation="gpt_oss",
    )


def _mixtral(fields: Fields) -> ModelSpec:
    shared = _shared(fields, _Defaults(num_kv_heads=8, max_position=131_072, norm_eps=1e-5, bos=1, eos=2))
    num_experts = _num_experts(fields, 8)
    rope = _rope(fields, shared, default_theta=1_000_000.0)
    return ModelSpec(
        **shared,
        layers=_same_layers(fields, fields.optional_integer("sliding_window"), rope, num_experts),
        num_experts_per_token=_experts_per_token(fields, 2, num_experts),
        expert_intermediate_size=shared["intermediate_size"],
    )


def _qwen3_moe(fields: Fields) -> ModelSpec:
    shared = _shared(fields, _Defaults(num_kv_heads=4, max_position=32_768))
    window = fields.nullable_integer("sliding_window", 4096) if fields.boolean("use_sliding_window", False) else None
    rope = _rope(fields, shared)
    bias = fields.boolean("attention_bias", False)
    num_experts = _num_experts(fields, 128)
    every = fields.integer("decoder_sparse_step", 1)
    dense = frozenset(fields.integers("mlp_only_layers"))
    return ModelSpec(
        **shared,
        layers=tuple(
            LayerSpec(window, rope, num_experts if i not in dense and (i + 1) % every == 0 else 0)
            for i in range(_num_layers(fields))
        ),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="head",
        num_experts_per_token=_experts_per_token(fields, 8, num_experts),
        expert_intermediate_size=fields.integer("moe_intermediate_size", 768),
        norm_topk_prob=fields.boolean("norm_topk_prob", False),
    )


FAMILIES: dict[str, tuple[str, Callable[[Fields], ModelSpec]]] = {
    # model_type in config.json: (family, reader)
    "llama": ("llama", _llama),
    "mistral": ("mistral", _mistral),
    "qwen2": ("qwen2", _qwen2),
    "qwen3": ("qwen3", _qwen3),
    "gemma2": ("gemma2", _gemma2),
    "gemma3_text": ("gemma3", _gemma3),
    "gemma3": ("gemma3", _gemma3),
    "phi3": ("phi3", _phi3),
    "olmo2": ("olmo2", _olmo2),
    "gpt_oss": ("gpt_oss", _gpt_oss),
    "mixtral": ("mixtral", _mixtral),
    "qwen3_moe": ("qwen3_moe", _qwen3_moe),
}


def _shared(fields: Fields, defaults: _Defaults, *, query_scale: bool = False) -> dict[str, Any]:
    """The arguments of ModelSpec that every family reads from the same keys."""
    hidden_size = fields.integer("hidden_size", defaults.hidden_size or None)
    num_heads = fields.integer("num_attention_heads", defaults.num_heads or None, high=65_536)
    num_kv_heads = fields.integer("num_key_value_heads", defaults.num_kv_heads or num_heads, high=65_536)
    if "num_key_value_heads" in fields.values and fields.values["num_key_value_heads"] is None:
        num_kv_heads = num_heads
    if num_heads % num_kv_heads:
        problem = f"{num_heads} attention heads cannot share {num_kv_heads} key-value heads evenly"
        raise fields.error(problem, "num_key_value_heads")
    head_dim = fields.optional_integer("head_dim", high=65_536) or defaults.head_dim
    if head_dim is None:
        if hidden_size % num_heads:
            problem = f"'hidden_size' {hidden_size} is not a multiple of {num_heads} attention heads"
            raise fields.error(problem, "hidden_size")
        head_dim = hidden_size // num_heads
    activation = fields.text(defaults.activation_key, defaults.activation)
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise fields.error(
            f"activation {shown(activation)} is not supported", defaults.activation_key, f"Known: {known}."
        )
    return {
        "family": FAMILIES[fields.values["model_type"]][0],
        "dtype": _dtype(fields),
        "vocab_size": fields.integer("vocab_size", defaults.vocab_size or None, high=MAX_VOCABULARY),
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "intermediate_size": fields.integer("intermediate_size", defaults.intermediate_size or None),
        "max_position": fields.integer("max_position_embeddings", defaults.max_position, high=MAX_POSITIONS),
        "norm_eps": fields.number("rms_norm_eps", defaults.norm_eps, high=1.0),
        "tie_embeddings": fields.boolean("tie_word_embeddings", defaults.tie_embeddings),
        "activation": _ACTIVATIONS[activation],
        "attention_scale": (fields.number("query_pre_attn_scalar", 256.0) if query_scale else head_dim) ** -0.5,
        "bos_token_id": fields.nullable_integer("bos_token_id", defaults.bos, low=0, high=MAX_VOCABULARY)
        if defaults.bos is not None
        else fields.optional_integer("bos_token_id", low=0, high=MAX_VOCABULARY),
        "eos_token_ids": _eos(fields, defaults.eos),
        "quantization": _quantization(fields),
    }


def _rope(fields: Fields, shared: dict[str, Any], *, default_theta: float = 10_000.0) -> RopeSpec:
    return read_rope(fields, shared["head_dim"], shared["max_position"], default_theta=default_theta)


def _eos(fields: Fields, default: int | None) -> tuple[int, ...]:
    if "eos_token_id" not in fields.values and default is not None:
        return (default,)
    return fields.integers("eos_token_id", high=MAX_VOCABULARY)


def _dtype(fields: Fields) -> str:
    """`torch_dtype` until transformers 4, `dtype` since 5; float32 when neither says it."""
    key = "dtype" if "dtype" in fields else "torch_dtype"
    name = fields.text(key, "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise fields.error(f"weights of type {shown(name)} are not supported", key, f"Known: {', '.join(_DTYPES)}.")
    return name


def _quantization(fields: Fields) -> str | None:
    table = fields.table("quantization_config")
    return table.text("quant_method", "unknown") if table is not None else None


def _soft_cap(fields: Fields, name: str, default: float | None) -> float | None:
    return fields.optional_number(name) if name in fields.values or default is None else default


def _num_layers(fields: Fields) -> int:
    return fields.integer("num_hidden_layers", high=MAX_LAYERS)


def _same_layers(fields: Fields, window: int | None, rope: RopeSpec, num_experts: int = 0) -> tuple[LayerSpec, ...]:
    return (LayerSpec(window, rope, num_experts),) * _num_layers(fields)


def _mixed_layers(
    fields: Fields,
    window: int | None,
    local: list[bool],
    local_rope: RopeSpec,
    global_rope: RopeSpec,
    num_experts: int = 0,
) -> tuple[LayerSpec, ...]:
    """Layers of which some see only a window: as `layer_types` says, else as `local` does."""
    kinds = fields.texts("layer_types")
    if kinds is not None:
        if len(kinds) != len(local):
            raise fields.error(f"'layer_types' names {len(kinds)} layers of {len(local)}", "layer_types")
        unknown = set(kinds) - {"sliding_attention", "full_attention"}
        if unknown:
            raise fields.error(f"layers of type {shown(min(unknown))} are not supported", "layer_types")
        local = [kind == "sliding_attention" for kind in kinds]
    if any(local) and window is None:
        raise fields.error("some layers see a sliding window, but its size is not given", "sliding_window")
    local_layer = LayerSpec(window, local_rope, num_experts)
    global_layer = LayerSpec(None, global_rope, num_experts)
    return tuple(local_layer if is_local else global_layer for is_local in local)


def _num_experts(fields: Fields, default: int) -> int:
    name = "num_local_experts" if "num_local_experts" in fields else "num_experts"
    return fields.integer(name, default, high=65_536)


def _experts_per_token(fields: Fields, default: int, num_experts: int) -> int:
    return fields.integer("num_experts_per_tok", default, high=num_experts)
