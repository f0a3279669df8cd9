"""What read_model_spec makes of published configurations, of transformers' own files, and of nonsense."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from published_configs import (
    GEMMA_3_1B,
    GEMMA_3_4B_MULTIMODAL,
    GPT_OSS_20B,
    LLAMA_3_1_8B,
    MISTRAL_7B,
    PHI_3_MINI_128K,
    PUBLISHED,
    QWEN_2_5_05B,
    QWEN_3_30B_A3B,
)
from transformers import AutoConfig

from powerband.errors import EnvironmentFault, UsageError
from powerband.spec import read_model_spec


def _changed(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(config), **changes}


def _windows(config: dict[str, Any]) -> list[int | None]:
    return [layer.window for layer in read_model_spec(config).layers]


@pytest.mark.parametrize("name", PUBLISHED)
def test_classic_keys_and_those_of_transformers_5_mean_the_same(name: str, tmp_path: Path) -> None:
    config = PUBLISHED[name]
    AutoConfig.for_model(**copy.deepcopy(config)).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_scaling" not in written
    assert read_model_spec(tmp_path) == read_model_spec(config)


def test_llama_keeps_its_numbers() -> None:
    spec = read_model_spec(LLAMA_3_1_8B)
    assert (spec.family, spec.dtype, spec.num_layers, spec.head_dim) == ("llama", "bfloat16", 32, 128)
    assert spec.eos_token_ids == (128001, 128008, 128009)
    rope = spec.layers[0].rope
    assert rope is not None
    assert (rope.scaling, rope.factor, rope.original_max_position, rope.theta) == ("llama3", 8.0, 8192, 500_000.0)


def test_sliding_windows_fall_on_the_right_layers() -> None:
    assert _windows(MISTRAL_7B) == [4096] * 32
    assert _windows(_changed(MISTRAL_7B, sliding_window=None)) == [None] * 32
    assert _windows(QWEN_2_5_05B) == [None] * 24
    assert _windows(_changed(QWEN_2_5_05B, use_sliding_window=True)) == [None] * 21 + [32768] * 3
    assert _windows(GPT_OSS_20B) == [128, None] * 12
    assert _windows(GEMMA_3_1B) == ([512] * 5 + [None]) * 4 + [512] * 2
    assert _windows(_changed(QWEN_3_30B_A3B, use_sliding_window=True, sliding_window=4096)) == [4096] * 48


def test_gemma3_layers_turn_with_two_bases_and_only_global_ones_are_scaled() -> None:
    spec = read_model_spec(GEMMA_3_4B_MULTIMODAL)
    local, everywhere = spec.layers[0].rope, spec.layers[5].rope
    assert local is not None
    assert everywhere is not None
    assert (local.theta, local.scaling) == (10_000.0, "none")
    assert (everywhere.theta, everywhere.scaling, everywhere.factor) == (1_000_000.0, "linear", 8.0)
    assert (spec.hidden_size, spec.num_heads, spec.vocab_size, spec.tie_embeddings) == (2560, 8, 262_208, True)
    assert (spec.dtype, spec.eos_token_ids, spec.embedding_scale) == ("bfloat16", (1, 106), math.sqrt(2560))


def test_experts_skip_the_layers_that_are_dense() -> None:
    spec = read_model_spec(_changed(QWEN_3_30B_A3B, num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3]))
    assert [layer.num_experts for layer in spec.layers] == [0, 128, 0, 0, 0, 128]


def test_quantization_of_the_checkpoint_is_named() -> None:
    assert read_model_spec(GPT_OSS_20B).quantization == "mxfp4"
    assert read_model_spec(LLAMA_3_1_8B).quantization is None


def test_a_folder_brings_the_ending_tokens_of_its_generation_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_2_5_05B))
    assert read_model_spec(tmp_path).eos_token_ids == (151645,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [151645, 151643]}')
    assert read_model_spec(tmp_path).eos_token_ids == (151645, 151643)
    assert read_model_spec(tmp_path / "config.json").eos_token_ids == (151645,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "'hidden_size' must lie between 1 and"),
        ({"hidden_size": -4096}, "not -4096"),
        ({"hidden_size": 4096.0}, "'hidden_size' must be an integer, not 4096.0"),
        ({"hidden_size": "4096"}, "'hidden_size' must be an integer, not '4096'"),
        ({"hidden_size": True}, "'hidden_size' must be an integer, not True"),
        ({"hidden_size": None}, "it has no 'hidden_size'"),
        ({"hidden_size": 4100}, "'hidden_size' 4100 is not a multiple of 32 attention heads"),
        ({"num_hidden_layers": 10**12}, "'num_hidden_layers' must lie between 1 and 10000"),
        ({"num_hidden_layers": 10**500}, "not an integer of more than 60 digits"),
        ({"num_key_value_heads": 5}, "32 attention heads cannot share 5 key-value heads evenly"),
        ({"head_dim": 127}, "127 of a head's 127 dimensions rotate; it must be even"),
        ({"vocab_size": 0}, "'vocab_size'"),
        ({"max_position_embeddings": -1}, "'max_position_embeddings'"),
        ({"rms_norm_eps": 0.0}, "'rms_norm_eps' must be above 0"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' must be a finite number"),
        ({"rope_theta": 1}, "'rope_theta' must be above 1"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope type 'spiral' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "it has no 'low_freq_factor'"),
        ({"rope_scaling": "yarn"}, "'rope_scaling' must be an object, not 'yarn'"),
        ({"rope_scaling": None, "rope_parameters": {"full_attention": {}}}, "only for Gemma 3"),
        ({"hidden_act": "relu"}, "activation 'relu' is not supported"),
        ({"torch_dtype": "float64"}, "weights of type 'float64' are not supported"),
        ({"eos_token_id": [1, -2]}, "'eos_token_id' must hold integers"),
        ({"attention_bias": "yes"}, "'attention_bias' must be true or false"),
    ],
)
def test_nonsense_is_refused_with_the_key_and_the_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_model_spec(_changed(LLAMA_3_1_8B, **changes))
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_changed(GPT_OSS_20B, layer_types=["full_attention"]), "'layer_types' names 1 layers of 24"),
        (_changed(GPT_OSS_20B, layer_types=["linear"] * 24), "layers of type 'linear' are not supported"),
        (_changed(GPT_OSS_20B, sliding_window=None), "its size is not given"),
        (_changed(LLAMA_3_1_8B, layer_types=["full_attention"] * 2), "can only be 'full_attention' for all"),
        (_changed(LLAMA_3_1_8B, layer_types=["sliding_attention"] * 32), "can only be 'full_attention' for all"),
        (
            _changed(LLAMA_3_1_8B, model_type="mistral", sliding_window=8, layer_types=["full_attention"] * 32),
            "can only be 'sliding_attention' for all",
        ),
        (_changed(QWEN_3_30B_A3B, layer_types=["sliding_attention"] * 48), "can only be 'full_attention' for all"),
        (_changed(GPT_OSS_20B, swiglu_limit=5.0), "'swiglu_limit' other than 7.0"),
        (_changed(QWEN_3_30B_A3B, num_experts_per_tok=129), "must lie between 1 and 128, not 129"),
        (_changed(PHI_3_MINI_128K, partial_rotary_factor=0.5), "'long_factor' must be a list of 24 numbers"),
        (_changed(GEMMA_3_1B, use_bidirectional_attention=True), "attends in both directions"),
        (_changed(QWEN_2_5_05B, model_type=7), "it has no 'model_type'"),
    ],
)
def test_what_a_family_cannot_be_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_model_spec(config)
    assert message.replace("long_factor", "short_factor") in str(caught.value).replace("long_factor", "short_factor")


def test_an_unknown_architecture_names_the_nearest_and_all_supported() -> None:
    with pytest.raises(UsageError) as caught:
        read_model_spec({"model_type": "qwen3_next"})
    assert "model_type 'qwen3_next' is not supported" in str(caught.value)
    assert "The nearest is 'qwen3" in caught.value.hint
    assert "llama, mistral" in caught.value.hint


def test_code_in_a_checkpoint_is_never_run_and_the_refusal_says_so() -> None:
    with pytest.raises(UsageError, match="brings Python code of its own"):
        read_model_spec({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}})


def test_files_that_are_missing_or_broken_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="Cannot read"):
        read_model_spec(tmp_path)
    path = tmp_path / "config.json"
    for content in ("{", "[" * 100_000, "[1]", "", '{"model_type": "llama", "vocab_size": ' + "9" * 5000 + "}"):
        path.write_text(content)
        with pytest.raises(UsageError, match=r"config\.json"):
            read_model_spec(path)
    path.write_bytes(b" " * (5 << 20))
    with pytest.raises(UsageError, match="larger than 4 MiB"):
        read_model_spec(path)


def test_absent_keys_have_the_values_they_have_in_transformers() -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 32}
    for model_type in sorted({config["model_type"] for config in PUBLISHED.values()} - {"gemma3"}):
        bare = {"model_type": model_type, "vocab_size": 256, **sizes}
        written = AutoConfig.for_model(**copy.deepcopy(bare)).to_dict()
        assert read_model_spec(bare) == read_model_spec(written)
