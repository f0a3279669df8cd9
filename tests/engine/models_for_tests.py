"""Tiny random checkpoints of every family, written by transformers, and what its greedy search says to them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 160
WINDOW = 24
ORIGINAL_POSITIONS = 64
NEW_TOKENS = 16
MARGIN = 3e-4  # least distance between the best and the second logit: well beyond rounding in float32

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL_POSITIONS,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 16.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": ORIGINAL_POSITIONS,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + 0.05 * i for i in range(6)],
    "long_factor": [1.5 + 0.6 * i for i in range(6)],
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 8.0}
_FOUR_LAYERS = ["sliding_attention", "full_attention"] * 2
_EXPERTS = {"num_experts_per_tok": 2}

# name: (configuration class, what differs from _SMALL)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("LlamaConfig", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama3": ("LlamaConfig", {"rope_parameters": _LLAMA3, "attention_bias": True, "tie_word_embeddings": True}),
    "llama_dynamic": ("LlamaConfig", {"rope_parameters": _DYNAMIC, "max_position_embeddings": ORIGINAL_POSITIONS}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2Config",
        {"sliding_window": WINDOW, "layer_types": _FOUR_LAYERS, "num_hidden_layers": 4, "query_pre_attn_scalar": 24},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"sliding_window": WINDOW, "layer_types": _FOUR_LAYERS, "num_hidden_layers": 4, "query_pre_attn_scalar": 24},
    ),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW}),
    "phi3_longrope": (
        "Phi3Config",
        {
            "rope_parameters": {**_LONGROPE, "partial_rotary_factor": 0.75},
            "original_max_position_embeddings": ORIGINAL_POSITIONS,
        },
    ),
    "olmo2": ("Olmo2Config", {"num_key_value_heads": 4}),
    "gpt_oss": (
        "GptOssConfig",
        {
            "sliding_window": WINDOW,
            "layer_types": _FOUR_LAYERS,
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "rope_parameters": _YARN,
            **_EXPERTS,
        },
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, **_EXPERTS}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "num_experts": 6,
            "moe_intermediate_size": 32,
            "mlp_only_layers": [1],
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
            **_EXPERTS,
        },
    ),
}

# Switches that a family's own checkpoints rarely use: name: (family, what differs)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_linear_rope": (
        "llama2",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    ),
    "llama_lengthened_by_linear_rope": (
        "llama2",
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 8.0},
            "max_position_embeddings": ORIGINAL_POSITIONS,
        },
    ),
    "qwen2_lengthened_by_yarn": (
        "qwen2",
        {
            "rope_parameters": {**_YARN, "factor": 8.0, "truncate": True},
            "max_position_embeddings": ORIGINAL_POSITIONS,
        },
    ),
    "llama_yarn_rope": ("llama2", {"rope_parameters": {**_YARN, "truncate": True}}),
    "llama_mlp_bias": ("llama2", {"mlp_bias": True, "num_key_value_heads": 1}),
    "qwen2_windows_in_later_layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "gemma2_without_caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3_scaled_global_layers": (
        "gemma3",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 100_000.0, "factor": 8.0},
            }
        },
    ),
    "mixtral_window": ("mixtral", {"sliding_window": WINDOW}),
    "qwen3_moe_plain_top_k": ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": [], "attention_bias": True}),
}


@dataclass(frozen=True, slots=True)
class Oracle:
    """Prompts, and transformers' greedy continuations of them in float32."""

    prompts: list[list[int]]
    continuations: list[list[int]]


def random_model(family: str, seed: int = 11, **changes: Any) -> Any:
    """A transformers model in float32 whose every parameter is random, biases, norms and sinks included."""
    import transformers

    config_class, different = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**_SMALL, **different, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.add_(noise * 0.1)
            elif "bias" in name or "sinks" in name:
                parameter.copy_(noise * 0.3)
            elif "experts" in name:
                parameter.copy_(noise * 0.25)
    return model.eval()


@cache
def prompts(family: str) -> list[list[int]]:
    """Shorter than a block, longer than the window, longer than the original rope length, a few hundred tokens.

    Where the rotation depends on the length of a sequence, also those that grow beyond the original length.
    """
    generator = torch.Generator().manual_seed(3)
    crossing = (55, 63, 64, 65) if family in ("phi3_longrope", "llama_dynamic") else ()
    lengths = (1, 13, *crossing, 70, 130, 301)
    return [torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def healthy_model(
    family: str, asked: list[list[int]] | None = None, new_tokens: int = NEW_TOKENS, **changes: Any
) -> tuple[Any, Oracle]:
    """A random model whose greedy choices are all clear, and what it says."""
    asked = asked or prompts(family)
    for seed in range(10):
        model = random_model(family, seed, **changes)
        continuations: list[list[int]] = []
        for prompt in asked:
            [continuation], margin = greedy(model, [prompt], new_tokens)
            if margin <= MARGIN:
                break
            continuations.append(continuation)
        else:
            return model, Oracle(asked, continuations)
    raise AssertionError(f"every random {family} hesitates")


def greedy(model: Any, asked: list[list[int]], max_new_tokens: int = NEW_TOKENS) -> tuple[list[list[int]], float]:
    """transformers' own greedy search, one prompt at a time, and its closest choice."""
    continuations = []
    margin = float("inf")
    for prompt in asked:
        # Dynamic scaling leaves in a model what its last prompt was rotated by.
        out = copy.deepcopy(model).generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        for scores in out.scores:
            best, second = scores[0].topk(2).values.tolist()
            margin = min(margin, best - second)
        continuations.append(out.sequences[0, len(prompt) :].tolist())
    return continuations, margin


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder
