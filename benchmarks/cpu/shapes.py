"""Shapes of the models that are compared, and what one step of them must read and compute at the least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GROUP = 128  # columns that share a scale in int4


@dataclass(frozen=True)
class Shape:
    """A decoder with tied embeddings, as in its config.json."""

    name: str
    config: dict[str, Any]

    @property
    def layer_parameters(self) -> int:
        """Weights of the projections of all layers."""
        c = self.config
        q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
        attention = c["hidden_size"] * (2 * q + 2 * kv)
        return int(c["num_hidden_layers"] * (attention + 3 * c["hidden_size"] * c["intermediate_size"]))

    @property
    def head_parameters(self) -> int:
        return int(self.config["vocab_size"] * self.config["hidden_size"])

    def kv_bytes_per_token(self, precision: str) -> int:
        """Beside quantized weights: a byte for each element, and a scale of 4 bytes for each head's key and value."""
        c = self.config
        per_head = 2 * c["head_dim"] if precision == "bf16" else c["head_dim"] + 4
        return int(2 * c["num_hidden_layers"] * c["num_key_value_heads"] * per_head)

    def weight_bytes(self, precision: str) -> int:
        """What a step reads of the weights. Scales are counted; in int4 the head is in int8, as everywhere."""
        layers, head = self.layer_parameters, self.head_parameters
        if precision == "bf16":
            return 2 * (layers + head)
        if precision == "int8":
            return layers + head
        return layers // 2 + 4 * layers // GROUP + head

    def step_bytes(self, precision: str, batch: int, context: int) -> int:
        """Least bytes that a decode step reads."""
        return self.weight_bytes(precision) + batch * context * self.kv_bytes_per_token(precision)

    def prefill_flops(self, tokens: int) -> float:
        """Floating point operations of one prompt: products, causal attention, and the head for its last row."""
        c = self.config
        attention = 4 * c["num_hidden_layers"] * c["num_attention_heads"] * c["head_dim"] * tokens * (tokens + 1) / 2
        return 2.0 * self.layer_parameters * tokens + attention + 2.0 * self.head_parameters


_COMMON: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "dtype": "bfloat16",
}

QWEN3_06B = Shape(
    "qwen3-0.6b",
    _COMMON
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000},
        "max_position_embeddings": 40_960,
    },
)

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_32_3B = Shape(
    "llama-3.2-3b",
    _COMMON
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": _LLAMA3_ROPE,
        "rope_parameters": _LLAMA3_ROPE | {"rope_theta": 500_000.0},
        "max_position_embeddings": 131_072,
    },
)

_SMALL = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
TINY = Shape("tiny", QWEN3_06B.config | _SMALL)  # to see that the benchmark itself works

SHAPES = {shape.name: shape for shape in (QWEN3_06B, LLAMA_32_3B, TINY)}
