"""config.json of a model by its sizes, for tests that plan with a model and do not run it. Published ones: spec/."""

from __future__ import annotations

from typing import Any


def model_config(
    hidden: int = 4096,
    layers: int = 32,
    heads: int = 32,
    kv_heads: int = 8,
    intermediate: int = 14336,
    vocab: int = 128256,
    **more: Any,
) -> dict[str, Any]:
    """Default: Llama 3 8B with a context of 8192. `more`: further keys of config.json, or other values for its keys."""
    return {
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    } | more


LLAMA_8B = model_config()
