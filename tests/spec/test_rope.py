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
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from powerband.spec import RopeSpec, read_model_spec
from powerband.spec.rope import rope_frequencies

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


def test_gemma3_scales_its_global_layers() -> None:
    theirs = AutoConfig.for_model(**copy.deepcopy(GEMMA_3_4B_MULTIMODAL)).text_config
    ours = read_model_spec(GEMMA_3_4B_MULTIMODAL).layers[5].rope
    assert ours is not None
    expected, _ = ROPE_INIT_FUNCTIONS["linear"](theirs, "cpu", layer_type="full_attention")
    torch.testing.assert_close(torch.tensor(rope_frequencies(ours)), expected, rtol=1e-5, atol=0)


def test_plain_frequencies_fall_from_one_to_almost_one_over_theta() -> None:
    frequencies = rope_frequencies(RopeSpec(theta=10_000.0, rotary_dim=4))
    assert frequencies == pytest.approx([1.0, 0.01])


def test_dynamic_scaling_changes_nothing_within_the_models_length() -> None:
    config = {**LLAMA_2_7B, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    theirs = AutoConfig.for_model(**copy.deepcopy(config))
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, "cpu", 4096)
    ours = read_model_spec(config).layers[0].rope
    assert ours is not None
    torch.testing.assert_close(torch.tensor(rope_frequencies(ours)), expected, rtol=1e-5, atol=0)
