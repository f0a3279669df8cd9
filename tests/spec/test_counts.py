"""Counts of parameters and FLOPs against transformers' own models, built without memory on torch's meta device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from published_configs import GPT_OSS_20B, LLAMA_3_1_8B, MIXTRAL_8X7B, PUBLISHED, QWEN_3_30B_A3B
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from powerband.errors import UsageError
from powerband.spec import read_model_spec
from powerband.spec.model.counts import (
    count_parameters,
    dtype_bytes,
    kv_bytes_per_token,
    kv_bytes_per_token_per_layer,
    step_flops,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "llama with biases": {**LLAMA_3_1_8B, "num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True},
    "llama with a head_dim of its own, tied": {
        **LLAMA_3_1_8B,
        "num_hidden_layers": 2,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "qwen3 with biases": {**PUBLISHED["Qwen3-0.6B"], "num_hidden_layers": 2, "attention_bias": True},
    "qwen3_moe with dense layers": {**QWEN_3_30B_A3B, "num_hidden_layers": 4, "mlp_only_layers": [1]},
    "gpt-oss without attention biases": {**GPT_OSS_20B, "num_hidden_layers": 2, "layer_types": None}
    | {"attention_bias": False},
}


def _on_meta(config: dict[str, Any]) -> PreTrainedModel:
    theirs = AutoConfig.for_model(**copy.deepcopy(config))
    theirs = getattr(theirs, "text_config", theirs)
    theirs.quantization_config = None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(theirs)


@pytest.mark.parametrize("name", [*PUBLISHED, *VARIANTS])
def test_parameters_equal_those_of_transformers(name: str) -> None:
    config = (PUBLISHED | VARIANTS)[name]
    expected = sum(parameter.numel() for parameter in _on_meta(config).parameters())
    assert count_parameters(read_model_spec(config)).total == expected


def test_bytes_follow_the_dtype() -> None:
    spec = read_model_spec(LLAMA_3_1_8B)
    assert kv_bytes_per_token_per_layer(spec, "float16") == 2 * 8 * 128 * 2
    assert kv_bytes_per_token(spec, "float16") == 131_072
    with pytest.raises(UsageError, match="Unknown dtype 'int3'"):
        dtype_bytes("int3")


TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "layer_types": None,
    "rope_scaling": None,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


@pytest.mark.parametrize(
    "name", ["Llama-3.1-8B", "Qwen2.5-0.5B", "Qwen3-0.6B", "Gemma-2-2B", "Phi-3-mini-128k", "OLMo-2-7B"]
)
def test_flops_of_a_dense_prefill_equal_torchs_count(name: str) -> None:
    config = {**PUBLISHED[name], **TINY, "sliding_window": None, "pad_token_id": 0}
    if name == "Gemma-2-2B":
        config["sliding_window"] = 256
    tokens = 24
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(config)), attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(tokens).unsqueeze(0), use_cache=False)
    ours = step_flops(read_model_spec(config), [(tokens, tokens)], sampled_rows=tokens)
    # torch counts all tokens² pairs; the causal mask leaves tokens·(tokens + 1) / 2 of them.
    all_pairs = ours.attention * 2 * tokens // (tokens + 1)
    assert ours.linear + ours.head + all_pairs == counter.get_total_flops()


def test_flops_of_experts_equal_torchs_count() -> None:
    sizes = {**TINY, "num_local_experts": 4, "num_experts_per_tok": 2, "torch_dtype": "float32"}
    config = {**MIXTRAL_8X7B, **sizes}
    tokens = 12
    torch.manual_seed(0)
    theirs = AutoConfig.for_model(**copy.deepcopy(config))
    model = AutoModelForCausalLM.from_config(theirs, attn_implementation="eager", experts_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(tokens).unsqueeze(0), use_cache=False)
    ours = step_flops(read_model_spec(config), [(tokens, tokens)], sampled_rows=tokens)
    assert ours.linear + ours.head + ours.attention * 2 * tokens // (tokens + 1) == counter.get_total_flops()


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
def test_attention_counts_every_visible_pair_once(window: int | None) -> None:
    config = {**PUBLISHED["Mistral-7B-v0.1"], "sliding_window": window, "num_hidden_layers": 1}
    spec = read_model_spec(config)
    for new, context in ((1, 1), (1, 9), (5, 5), (4, 12), (12, 12), (7, 40)):
        positions = range(context - new, context)
        pairs = sum(min(p + 1, window or p + 1) for p in positions)
        assert step_flops(spec, [(new, context)], 0).attention == 4 * 32 * 128 * pairs


def test_a_mixed_step_is_the_sum_of_its_parts() -> None:
    spec = read_model_spec(GPT_OSS_20B)
    prefill, decode = step_flops(spec, [(300, 300)], 1), step_flops(spec, [(1, 5000)], 1)
    assert step_flops(spec, [(300, 300), (1, 5000)], 2).total == prefill.total + decode.total
