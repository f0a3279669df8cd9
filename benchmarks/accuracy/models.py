"""Models of the tables: the keys of their public config.json that matter."""

from __future__ import annotations

from functools import cache
from typing import Any

from powerband.spec.model.model_spec import ModelSpec
from powerband.spec.model.reader import read_model_spec

# family, hidden, intermediate, heads, KV heads, layers, vocabulary, and what else differs
_MODELS: dict[str, tuple[str, int, int, int, int, int, int, dict[str, Any]]] = {
    "llama-2-7b": ("llama", 4096, 11008, 32, 32, 32, 32000, {}),
    "llama-2-70b": ("llama", 8192, 28672, 64, 8, 80, 32000, {}),
    "llama-3.1-8b": ("llama", 4096, 14336, 32, 8, 32, 128256, {}),
    "llama-3.1-70b": ("llama", 8192, 28672, 64, 8, 80, 128256, {}),
    "llama-3.1-405b": ("llama", 16384, 53248, 128, 8, 126, 128256, {}),
    "codellama-34b": ("llama", 8192, 22016, 64, 8, 48, 32000, {}),
    "qwen3-32b": ("qwen3", 5120, 25600, 64, 8, 64, 151936, {"head_dim": 128}),
    "qwen2.5-7b": ("qwen2", 3584, 18944, 28, 4, 28, 152064, {}),
    "mistral-7b": ("mistral", 4096, 14336, 32, 8, 32, 32000, {}),
    "mistral-nemo": ("mistral", 5120, 14336, 32, 8, 40, 131072, {"head_dim": 128}),
    "mixtral-8x7b": ("mixtral", 4096, 14336, 32, 8, 32, 32000, {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "mixtral-8x22b": ("mixtral", 6144, 16384, 48, 8, 56, 32768, {"num_local_experts": 8, "num_experts_per_tok": 2}),
}


@cache
def spec(name: str) -> ModelSpec:
    family, hidden, inner, heads, kv_heads, layers, vocabulary, more = _MODELS[name]
    return read_model_spec(
        {
            "model_type": family,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "num_hidden_layers": layers,
            "vocab_size": vocabulary,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            **more,
        }
    )
