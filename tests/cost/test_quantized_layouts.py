"""Quantized checkpoints on several ranks: layouts that vLLM refuses to load, and what it reported of their weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model_configs import model_config
from powerband.cost.latency import LatencyModel
from powerband.cost.replica_memory import layer_weight_bytes, plan_replica, weight_bytes
from powerband.spec.deployment import Quantization, Replica
from powerband.spec.hardware.catalog import load_catalog
from powerband.spec.model.checkpoint_precision import read_for_planning
from powerband.spec.model.model_spec import ModelSpec

GIB = 1 << 30
H200 = load_catalog().find("H200")
FP8_BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
QWEN_72B = model_config(8192, 80, 64, 8, 29568, 152064, model_type="qwen2")
LLAMA_70B = model_config(8192, 80, 64, 8, 28672)
# Meta's FP8 checkpoint: attention and the first and last MLP are in 16 bits.
LLAMA_405B = model_config(16384, 126, 128, 8, 53248)
META_FP8 = {
    "quant_method": "fbgemm_fp8",
    "modules_to_not_convert": [
        "lm_head",
        *(f"model.layers.{i}.self_attn.{name}_proj" for i in range(126) for name in "qkvo"),
        *(f"model.layers.{i}.mlp.{name}_proj" for i in (0, 125) for name in ("gate", "up", "down")),
    ],
}


def experts(hidden: int, layers: int, heads: int, width: int) -> dict[str, Any]:
    return model_config(
        *(hidden, layers, heads, 4, 4 * width, 151936),
        model_type="qwen3_moe",
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=width,
    )


QWEN3_30B, QWEN3_235B = experts(2048, 48, 32, 768), experts(4096, 94, 64, 1536)


def read(folder: Path, config: dict[str, Any], quantization: dict[str, Any]) -> tuple[ModelSpec, Quantization]:
    file = folder / "config.json"
    file.write_text(json.dumps({**config, "quantization_config": quantization}))
    spec, stored = read_for_planning(file)
    return spec, stored.quantization


@pytest.mark.parametrize(
    ("config", "quantization", "tensor", "expert", "refused"),
    [
        (QWEN3_235B, FP8_BLOCKS, 8, 1, "192 outputs of gate_proj"),  # vllm-project/vllm#17569
        (QWEN3_235B, FP8_BLOCKS, 8, 8, ""),
        (QWEN3_235B, FP8_BLOCKS, 4, 1, ""),
        (QWEN3_30B, FP8_BLOCKS, 4, 1, "192 outputs of gate_proj"),  # #25292
        (QWEN3_30B, FP8_BLOCKS, 2, 1, ""),
        (QWEN3_30B, GPTQ, 4, 1, "192 inputs of down_proj"),  # #17604
        (QWEN_72B, AWQ, 2, 1, "14784 inputs of down_proj"),  # #13640
        (QWEN_72B, GPTQ, 4, 1, "7392 inputs of down_proj"),
        (QWEN_72B, AWQ, 1, 1, ""),
        (QWEN_72B, {**AWQ, "group_size": 32}, 2, 1, ""),
        (QWEN_72B, {**AWQ, "group_size": -1}, 2, 1, ""),  # one group of all inputs
        (QWEN_72B, {**AWQ, "modules_to_not_convert": ["down_proj"]}, 2, 1, ""),  # no scales to divide
        (LLAMA_70B, GPTQ, 8, 1, ""),
        (model_config(4096, 32, 32, 8, 14336, head_dim=64), FP8_BLOCKS, 8, 1, "64 outputs of k_proj"),
        (
            LLAMA_70B,
            {"config_groups": {"g": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 1024}}}},
            8,
            1,
            "3584 inputs of down_proj",
        ),
    ],
)
def test_blocks_of_scales_are_not_divided(
    config: dict[str, Any], quantization: dict[str, Any], tensor: int, expert: int, refused: str, tmp_path: Path
) -> None:
    spec, stored = read(tmp_path, config, quantization)
    replica = Replica(
        device="H200", tensor_parallel=tensor, expert_parallel=expert, quantization=stored, max_model_len=8192
    )
    problem = plan_replica(spec, H200, replica, "vllm").problem
    assert refused in problem
    assert bool(problem) is bool(refused)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_ranks_share_the_inner_size_evenly(tensor: int, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(model_config(intermediate=14338)))
    spec, _ = read_for_planning(file)
    problem = plan_replica(
        spec, H200, Replica(device="H200", tensor_parallel=tensor, max_model_len=8192), "vllm"
    ).problem
    assert (problem == "an inner size of 14338 cannot be divided over 4 devices") is (tensor == 4)


@pytest.mark.parametrize(("kv_heads", "tolerance"), [(8, 0.02), (16, 0.002)])  # the first release had 16
def test_llama_405b_in_fp8_takes_what_vllm_logged(kv_heads: int, tolerance: float, tmp_path: Path) -> None:
    spec, stored = read(tmp_path, {**LLAMA_405B, "num_key_value_heads": kv_heads}, META_FP8)
    replica = Replica(device="H100", tensor_parallel=8, quantization=stored, max_model_len=8192)
    assert weight_bytes(spec, replica) / GIB == pytest.approx(57.752, rel=tolerance)  # vllm-project/vllm#6746


def test_a_stage_with_more_modules_in_16_bits_is_the_fullest(tmp_path: Path) -> None:
    spec, stored = read(tmp_path, LLAMA_70B, {**FP8_BLOCKS, "modules_to_not_convert": ["model.layers.79"]})
    replica = Replica(device="H100", pipeline_parallel=2, quantization=stored, max_model_len=8192)
    even = layer_weight_bytes(replace(spec, quantized_modules=None), replica)
    projections = 2 * 8192 * (8192 + 1024) + 3 * 8192 * 28672
    assert layer_weight_bytes(spec, replica) - even == projections  # a byte more of each element


def test_scales_of_small_groups_take_more_memory(tmp_path: Path) -> None:
    sizes = {}
    for group in (32, 128):
        spec, stored = read(tmp_path, LLAMA_70B, {**GPTQ, "group_size": group})
        sizes[group] = layer_weight_bytes(spec, Replica(device="H100", quantization=stored, max_model_len=8192))
    assert sizes[32] / sizes[128] == pytest.approx((0.5 + 2.5 / 32) / (0.5 + 2.5 / 128), rel=1e-3)


@pytest.mark.parametrize(("is_stored", "expected"), [(True, 0.5 + 2.5 / 128), (False, 2.0)])
def test_a_quantized_head_takes_what_it_holds(is_stored: bool, expected: float, tmp_path: Path) -> None:
    spec, stored = read(tmp_path, LLAMA_70B, {**GPTQ, "lm_head": is_stored})
    replica = Replica(device="H100", quantization=stored, max_model_len=8192)
    ends = weight_bytes(spec, replica) - layer_weight_bytes(spec, replica)
    assert ends == pytest.approx(128256 * 8192 * (2 + expected), rel=1e-6)


def test_modules_in_16_bits_are_computed_in_16_bits(tmp_path: Path) -> None:
    """A decode of one token reads all weights: its time grows as the bytes do."""
    seconds = {}
    for name, ignored in (("none", []), ("attention", ["self_attn"]), ("all", ["self_attn", "mlp"])):
        spec, stored = read(tmp_path, LLAMA_70B, {**FP8_BLOCKS, "modules_to_not_convert": ignored})
        model = LatencyModel(spec, H200, Replica(device="H200", quantization=stored, max_model_len=8192), "vllm")
        seconds[name] = model.parts([(1, 512)], 1)["projections"]
    plain = LatencyModel(
        replace(spec, quantized_modules=None), H200, Replica(device="H200", max_model_len=8192), "vllm"
    ).parts([(1, 512)], 1)["projections"]
    assert seconds["none"] < seconds["attention"] < seconds["all"] == plain
