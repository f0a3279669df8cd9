"""What a model is: its shapes and switches, in one normal form for every family.

The engine builds a decoder from it, the planner and the memory plan count with it (`spec/model/counts.py`).
Translating a family's config.json into this form is `spec/model/families.py`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Literal

from powerband.spec.checkpoint.quantization import WeightFormat
from powerband.spec.checkpoint.quantized_modules import QuantizedModules
from powerband.spec.model.pooling import PoolingSpec


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of one kind of layer."""

    theta: float
    rotary_dim: int  # leading dimensions of a head that rotate
    scaling: Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"] = "none"
    factor: float = 1.0
    original_max_position: int = 0  # the length trained before scaling (dynamic, llama3, yarn, longrope)
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: whether correction bounds are rounded
    attention_factor: float = 1.0  # multiplies cos and sin (yarn, longrope)
    short_factor: tuple[float, ...] = ()  # longrope
    long_factor: tuple[float, ...] = ()  # longrope


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What differs between the layers of one model."""

    window: int | None  # sliding window: a token sees itself and the window-1 before it; None: everything
    rope: RopeSpec | None
    num_experts: int = 0  # 0: a dense MLP


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """What encoders have and decoders lack: rows of learned positions and of token types, added to the embedding."""

    num_positions: int
    position_offset: int  # the row of a text's first position
    num_types: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only language model, or an encoder. Sizes in elements; see the methods for bytes and FLOPs."""

    family: (
        str  # llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3, olmo2, gpt_oss, mixtral, qwen3_moe, bert, roberta, …
    )
    dtype: str  # as stored: float32 | float16 | bfloat16
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int  # of a dense MLP
    max_position: int
    norm_eps: float
    tie_embeddings: bool
    layers: tuple[LayerSpec, ...]
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    # attention
    attention_scale: float = 0.0  # set by the reader (usually head_dim ** -0.5)
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = (
        "none"  # RMSNorm over each head (Qwen3, Gemma 3) or the whole projection (OLMo-2)
    )
    attention_softcap: float | None = None
    attention_sinks: bool = False
    # MLP
    mlp_bias: bool = False
    num_experts_per_token: int = 0
    expert_intermediate_size: int = 0
    norm_topk_prob: bool = True
    router_bias: bool = False
    expert_bias: bool = False
    expert_activation: Literal["gated", "gpt_oss"] = "gated"  # gpt_oss: clamped (limit 7), alpha 1.702, (up + 1) * glu
    # norms: "pre": before attention and MLP; "post": only after them (OLMo-2); "both": before and after (Gemma)
    norm_placement: Literal["pre", "post", "both"] = "pre"
    norm_weight_offset: float = 0.0  # Gemma stores weight - 1
    embedding_scale: float = 1.0  # Gemma: sqrt(hidden_size), rounded to the model's dtype when applied
    logit_softcap: float | None = None
    # tokens
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    quantization: str | None = None  # how the checkpoint's weights are stored, e.g. "mxfp4"; None: plain
    weight_format: WeightFormat | None = None  # the details, where the engine computes with the stored values
    # What becomes of a prompt that is pooled; None: the model cannot. No part of shape_digest, as is the next.
    pooling: PoolingSpec | None = field(default=None, repr=False)
    generates: bool = field(default=True, repr=False)  # False: prompts are pooled and nothing else
    # Sees a text in both directions, with norms of mean and deviation, MLPs without a gate, no cache; None: a decoder.
    encoder: EncoderSpec | None = field(default=None, repr=False)
    # What is quantized in a checkpoint that is planned as if it were stored in 16 bits. No part of shape_digest.
    quantized_modules: QuantizedModules | None = field(default=None, repr=False)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def length_rope(self) -> RopeSpec | None:
        """The rotary embedding whose frequencies depend on a sequence's length; None: the model has none such."""
        ropes = (layer.rope for layer in self.layers if layer.rope is not None)
        return next((rope for rope in ropes if rope.scaling in ("dynamic", "longrope")), None)

    @property
    def shape_digest(self) -> str:
        """Names everything that the time of a step depends on: sizes and switches, not tokens, scales and weights."""
        shape = replace(self, norm_eps=0.0, attention_scale=0.0, bos_token_id=None, eos_token_ids=())
        return hashlib.sha256(repr(shape).encode()).hexdigest()[:16]
