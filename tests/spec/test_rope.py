"""Rotary frequencies against transformers' own, for every way of scaling."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from published_configs import (
    GEMMA_3_4B_MULTIMODAL,
    GPT_OSS_20B,
    LLAMA_2_7B,
    LLAMA_3_1_8B,
    PHI_3_MINI_128K,
    QWEN_2_5_05B,
)
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from powerband.engine.layers.rotary import RotaryTable
from powerband.errors import UsageError
from powerband.spec import RopeSpec, read_model_spec
from powerband.spec.model.rope import rope_frequencies

SCALED: dict[str, dict[str, Any]] = {
    "llama3": LLAMA_3_1_8B,
    "llama3, original length beside the table": {**LLAMA_3_1_8B, "original_max_position_embeddings": 4096},
    "linear": {**LLAMA_2_7B, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear, half of each head": {
        **LLAMA_2_7B,
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "partial_rotary_factor": 0.5,
    },
    "yarn of gpt-oss": GPT_OSS_20B,
    "yarn of gpt-oss, by default": {k: v for k, v in GPT_OSS_20B.items() if k not in ("rope_scaling", "rope_theta")},
    "yarn of Qwen": {
        **QWEN_2_5_05B,
        "max_position_embeddings": 131072,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
    "yarn with mscale": {
        **QWEN_2_5_05B,
        "rope_scaling": {"rope_type": "yarn", "factor": 40, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 16},
    },
    "longrope": PHI_3_MINI_128K,
    "longrope, half of each head": {
        **PHI_3_MINI_128K,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"type": "longrope", "long_factor": [4.0] * 24, "short_factor": [1.1] * 24},
    },
}


@pytest.mark.parametrize("name", SCALED)
def test_scaled_frequencies_equal_those_of_transformers(name: str) -> None:
    theirs = AutoConfig.for_model(**copy.deepcopy(SCALED[name]))
    ours = read_model_spec(SCALED[name]).layers[0].rope
    assert ours is not None
    for context in (1, 131072):
        expected, attention_factor = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]](theirs, "cpu", context)
        actual = torch.tensor(rope_frequencies(ours, context))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
        assert ours.attention_factor == pytest.approx(attention_factor)


_LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_scaling": {}, "rope_parameters": _LINEAR},
        {"rope_scaling": {}, "rope_theta": 500.0},
        {"rope_parameters": {}, "rope_theta": 500.0},
        {"rope_scaling": {}},
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gpt_oss", "phi3"])
def test_empty_tables_and_partial_rotation_are_read_as_transformers_does(family: str, keys: dict[str, Any]) -> None:
    """Against the model's own rotary layer."""
    if family == "phi3" and "linear" in str(keys):
        pytest.skip("transformers knows only longrope there")
    size = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 50}
    config = {"model_type": family, **size, "intermediate_size": 64, "num_hidden_layers": 2, "num_local_experts": 2}
    config |= {"max_position_embeddings": 512, "pad_token_id": 0, **keys}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(config))).model.rotary_emb
    ours = read_model_spec(config).layers[0].rope
    assert ours is not None
    torch.testing.assert_close(torch.tensor(rope_frequencies(ours)), theirs.inv_freq, rtol=1e-5, atol=0)
    assert ours.attention_factor == pytest.approx(theirs.attention_scaling)


def test_gemma3_scales_its_global_layers() -> None:
    theirs = AutoConfig.for_model(**copy.deepcopy(GEMMA_3_4B_MULTIMODAL)).text_config
    ours = read_model_spec(GEMMA_3_4B_MULTIMODAL).layers[5].rope
    assert ours is not None
    expected, _ = ROPE_INIT_FUNCTIONS["linear"](theirs, "cpu", layer_type="full_attention")
    torch.testing.assert_close(torch.tensor(rope_frequencies(ours)), expected, rtol=1e-5, atol=0)


def test_plain_frequencies_fall_from_one_to_almost_one_over_theta() -> None:
    frequencies = rope_frequencies(RopeSpec(theta=10_000.0, rotary_dim=4))
    assert frequencies == pytest.approx([1.0, 0.01])


@pytest.mark.parametrize("length", [0, 100, 4096, 4097, 6000, 8192])
def test_dynamic_frequencies_follow_the_length_of_the_sequence(length: int) -> None:
    config = {**LLAMA_2_7B, "rope_scaling": {"type": "dynamic", "factor": 2.5}}
    theirs = AutoConfig.for_model(**copy.deepcopy(config))
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, "cpu", length)
    ours = read_model_spec(config).layers[0].rope
    assert ours is not None
    torch.testing.assert_close(torch.tensor(rope_frequencies(ours, length)), expected, rtol=1e-5, atol=0)
    table = RotaryTable(ours, 10_240, dtype=torch.float32, device=torch.device("cpu"))
    cos, _ = table.at(torch.tensor([length]), torch.tensor([length]))
    angles = length * ROPE_INIT_FUNCTIONS["dynamic"](theirs, "cpu", length + 1)[0]
    torch.testing.assert_close(cos[0, 0, : len(angles)], angles.cos(), rtol=0, atol=2e-3)


# ---- the context


def scaled(config: dict[str, Any], max_position: int, **scaling: Any) -> dict[str, Any]:
    return {**config, "max_position_embeddings": max_position, "rope_scaling": scaling}


CONTEXTS: dict[str, tuple[dict[str, Any], int]] = {
    # As the cards of Qwen2.5 and Qwen3 tell their users to write it
    "Qwen2.5 with yarn": (
        scaled(QWEN_2_5_05B, 32_768, type="yarn", factor=4.0, original_max_position_embeddings=32_768),
        131_072,
    ),
    "Qwen3 with yarn": (
        scaled(QWEN_2_5_05B, 40_960, rope_type="yarn", factor=4.0, original_max_position_embeddings=32_768),
        131_072,
    ),
    "yarn, said to be lengthened": (
        scaled(QWEN_2_5_05B, 131_072, type="yarn", factor=4.0, original_max_position_embeddings=32_768),
        131_072,
    ),
    "yarn without an original length": (scaled(QWEN_2_5_05B, 32_768, type="yarn", factor=4.0), 131_072),
    "gpt-oss": (GPT_OSS_20B, 131_072),
    # lmsys/vicuna-7b-v1.5-16k
    "linear": (scaled(LLAMA_2_7B, 4096, type="linear", factor=4.0), 16_384),
    "dynamic": (scaled(LLAMA_2_7B, 4096, rope_type="dynamic", factor=2.0), 8192),
    "a factor that is no whole number": (scaled(LLAMA_2_7B, 2048, type="linear", factor=1.5), 3072),
    "Llama 3.1": (LLAMA_3_1_8B, 131_072),
    "llama3, not yet lengthened": (
        {**LLAMA_3_1_8B, "max_position_embeddings": 8192},
        65_536,
    ),
    "Phi-3 128k": (PHI_3_MINI_128K, 131_072),
    "Gemma 3": (GEMMA_3_4B_MULTIMODAL, 131_072),
    "no scaling": (LLAMA_2_7B, 4096),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_rope_scaling_lengthens_the_context(name: str) -> None:
    config, expected = CONTEXTS[name]
    assert read_model_spec(config).max_position == expected


@pytest.mark.parametrize("name", [name for name in CONTEXTS if name not in ("Gemma 3", "no scaling")])
def test_old_and_new_spellings_mean_the_same(name: str) -> None:
    """rope_theta beside rope_scaling with "type", and all in rope_parameters with "rope_type"."""
    config, _ = CONTEXTS[name]
    table = {**config["rope_scaling"]}
    kind = table.pop("rope_type", table.pop("type", None))
    rest = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_theta")}
    theta = config.get("rope_theta", 10_000.0)
    old = {**rest, "rope_theta": theta, "rope_scaling": {**table, "type": kind}}
    new = {**rest, "rope_parameters": {**table, "rope_type": kind, "rope_theta": theta}}
    assert read_model_spec(new) == read_model_spec(old) == read_model_spec(config)


def test_a_context_beyond_all_bounds_is_refused() -> None:
    with pytest.raises(UsageError, match="rope scaling makes a context of 4096000000000"):
        read_model_spec(scaled(LLAMA_2_7B, 4096, type="linear", factor=1e9))
