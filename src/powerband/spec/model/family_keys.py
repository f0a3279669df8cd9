"""Keys of a config.json that families share: sizes, token ids, which layer sees how far, how many experts there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from powerband.spec.checkpoint.quantization import read_weight_format
from powerband.spec.config_reader import MAX_LAYERS, MAX_POSITIONS, MAX_VOCABULARY, ConfigReader, shown
from powerband.spec.model.model_spec import LayerSpec, RopeSpec
from powerband.spec.model.rope import read_rope

_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh", "gelu"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Defaults:
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


def shared_arguments(fields: ConfigReader, defaults: Defaults, *, query_scale: bool = False) -> dict[str, Any]:
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
    quantization, weight_format = read_weight_format(fields)
    return {
        "family": fields.values["model_type"].removesuffix("_text"),
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
        "bos_token_id": fields.nullable_integer("bos_token_id", defaults.bos, low=0, high=MAX_VOCABULARY),
        "eos_token_ids": _eos(fields, defaults.eos),
        "quantization": quantization,
        "weight_format": weight_format,
    }


def one_rope(fields: ConfigReader, shared: dict[str, Any], *, default_theta: float = 10_000.0) -> RopeSpec:
    return read_rope(fields, shared["head_dim"], shared["max_position"], default_theta=default_theta)


def _eos(fields: ConfigReader, default: int | None) -> tuple[int, ...]:
    if "eos_token_id" not in fields.values and default is not None:
        return (default,)
    return fields.token_ids("eos_token_id")


def _dtype(fields: ConfigReader) -> str:
    """`torch_dtype` until transformers 4, `dtype` since 5; float32 when neither says it."""
    key = "dtype" if "dtype" in fields else "torch_dtype"
    name = fields.text(key, "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise fields.error(f"weights of type {shown(name)} are not supported", key, f"Known: {', '.join(_DTYPES)}.")
    return name


def soft_cap(fields: ConfigReader, name: str, default: float | None) -> float | None:
    return fields.optional_number(name) if name in fields.values or default is None else default


def read_num_layers(fields: ConfigReader) -> int:
    return fields.integer("num_hidden_layers", high=MAX_LAYERS)


def same_layers(
    fields: ConfigReader, window: int | None, rope: RopeSpec, num_experts: int = 0
) -> tuple[LayerSpec, ...]:
    check_layer_types(fields, window)
    return (LayerSpec(window, rope, num_experts),) * read_num_layers(fields)


def check_layer_types(fields: ConfigReader, window: int | None) -> None:
    """Refuse `layer_types` that say something else than a family does, which does not read them."""
    kinds = fields.texts("layer_types")
    own = "full_attention" if window is None else "sliding_attention"
    if kinds is not None and kinds != [own] * read_num_layers(fields):
        family = fields.values.get("model_type")
        raise fields.error(
            f"'layer_types' of a {family} model can only be {own!r} for all of its layers, not {shown(kinds)}",
            "layer_types",
            f"{family} does not read them, so its layers are all alike; remove them if that is right.",
        )


def mixed_layers(
    fields: ConfigReader,
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


def read_num_experts(fields: ConfigReader, default: int) -> int:
    name = "num_local_experts" if "num_local_experts" in fields else "num_experts"
    return fields.integer(name, default, high=65_536)


def experts_per_token(fields: ConfigReader, default: int, num_experts: int) -> int:
    return fields.integer("num_experts_per_tok", default, high=num_experts)
