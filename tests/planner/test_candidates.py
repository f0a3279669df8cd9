"""Kinds of replicas: what fits, how, and the reasons why the rest does not."""

from __future__ import annotations

from typing import Any

import pytest

from model_configs import model_config
from powerband.errors import UsageError
from powerband.planner.candidates import SearchSpace, replica_options
from powerband.planner.results import Pruned
from powerband.spec.hardware.catalog import load_catalog
from powerband.spec.hardware.profile import DeviceProfile, Evidence, GemmModel
from powerband.spec.model.checkpoint_precision import CheckpointPrecision, stored_precision
from powerband.spec.model.model_spec import ModelSpec
from powerband.spec.model.reader import read_model_spec


def llama(*sizes: int) -> ModelSpec:
    return read_model_spec(model_config(*sizes))


LLAMA_8B = llama(4096, 32, 32, 8, 14336, 128256)
LLAMA_13B = llama(5120, 40, 40, 40, 13824, 32000)
LLAMA_70B = llama(8192, 80, 64, 8, 28672, 128256)


def space(*devices: str, engines: tuple[str, ...] = ("vllm",), most: int = 8, **more: Any) -> SearchSpace:
    profiles = [load_catalog().find(name) for name in devices]
    return SearchSpace(profiles=profiles, engines=engines, max_devices=most, max_model_len=4096, **more)  # type: ignore[arg-type] # names of engines


def reason(pruned: list[Pruned], what: str) -> str:
    return next(one.reason for one in pruned if one.what.startswith(what))


def test_a_small_model_fits_one_small_card_and_may_be_divided() -> None:
    found, _ = replica_options(LLAMA_8B, CheckpointPrecision(), space("L4"))
    plain = [k.replica for k in found if k.replica.quantization == "none"]
    layouts = {(r.tensor_parallel, r.pipeline_parallel) for r in plain}
    assert {(1, 1), (2, 1), (1, 2), (4, 2), (2, 4), (8, 1), (1, 8)} <= layouts
    assert not any(r.offload_share for r in plain)


def test_a_large_model_is_divided_and_what_is_too_large_says_so() -> None:
    found, pruned = replica_options(LLAMA_70B, CheckpointPrecision(), space("L4", engines=("trtllm",)))
    plain = [k.replica for k in found if k.replica.quantization == "none"]
    assert plain
    assert all(r.num_devices == 8 for r in plain)
    assert reason(pruned, "trtllm on 4 L4, 16 bits").startswith("needs ")


def test_llama_2_13b_in_16_bits_lies_partly_in_the_hosts_memory_of_one_24_gb_card() -> None:
    found, _ = replica_options(LLAMA_13B, CheckpointPrecision(), space("L4", most=1, quantizations=("none",)))
    assert [0 < k.replica.offload_share <= 0.5 for k in found] == [True]


def test_precisions_follow_the_device_and_the_engine() -> None:
    on_ampere, pruned = replica_options(LLAMA_8B, CheckpointPrecision(), space("A100-80G", most=1))
    assert {k.replica.quantization for k in on_ampere} == {"none"}
    assert "no kernels for fp8 on ampere" in reason(pruned, "vllm on A100-80G in fp8")
    on_hopper, _ = replica_options(LLAMA_8B, CheckpointPrecision(), space("H100", most=1))
    assert {(k.replica.quantization, k.replica.kv_precision) for k in on_hopper} == {
        ("none", "16bit"),
        ("fp8", "16bit"),
        ("fp8", "fp8"),
    }
    asked, _ = replica_options(LLAMA_8B, CheckpointPrecision(), space("A100-80G", most=1, quantizations=("int4",)))
    assert {k.replica.quantization for k in asked} == {"int4"}


def test_our_own_engine_runs_on_one_device() -> None:
    found, _ = replica_options(LLAMA_8B, CheckpointPrecision(), space("H100", engines=("powerband",)))
    assert [(k.replica.num_devices, k.replica.quantization) for k in found] == [(1, "none")]


def test_pinned_fields_hold_for_all() -> None:
    found, _ = replica_options(
        LLAMA_8B, CheckpointPrecision(), space("L4", pinned={"tensor_parallel": 2, "max_num_seqs": 32})
    )
    assert {(k.replica.tensor_parallel, k.replica.max_num_seqs) for k in found} == {(2, 32)}


@pytest.mark.parametrize(
    ("quantization_config", "stored"),
    [
        ({"quant_method": "gptq", "bits": 4}, CheckpointPrecision("int4")),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, CheckpointPrecision("fp8")),
        ({"quant_method": "fp8", "activation_scheme": "static"}, CheckpointPrecision("fp8_static")),
        ({"quant_method": "mxfp4"}, CheckpointPrecision("mxfp4")),
        (
            {
                "config_groups": {
                    "group_0": {
                        "weights": {"num_bits": 8, "type": "float"},
                        "input_activations": {"num_bits": 8, "type": "float", "dynamic": False},
                    }
                },
                "kv_cache_scheme": {"num_bits": 8, "type": "float"},
            },
            CheckpointPrecision("fp8_static", "fp8"),
        ),
        (
            {
                "config_groups": {
                    "g": {"weights": {"num_bits": 8, "type": "int"}, "input_activations": {"dynamic": True}}
                }
            },
            CheckpointPrecision("w8a8"),
        ),
        (
            {"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}},
            CheckpointPrecision("nvfp4", "fp8"),
        ),
    ],
)
def test_a_checkpoint_says_its_precision(quantization_config: dict[str, Any], stored: CheckpointPrecision) -> None:
    assert stored_precision({"quantization_config": quantization_config}) == stored


def test_a_stored_precision_is_not_to_be_changed() -> None:
    found, _ = replica_options(LLAMA_8B, CheckpointPrecision("fp8_static", "fp8"), space("H100", most=1))
    assert {(k.replica.quantization, k.replica.kv_precision) for k in found} == {("fp8_static", "fp8")}
    with pytest.raises(UsageError, match="stored in fp8"):
        replica_options(LLAMA_8B, CheckpointPrecision("fp8"), space("H100", quantizations=("int4",)))
    with pytest.raises(UsageError, match="cannot be planned"):
        stored_precision({"quantization_config": {"quant_method": "aqlm"}})


def test_a_precision_that_was_not_measured_on_this_machine_is_left_out_of_its_plans() -> None:
    measured = GemmModel(
        compute_share=0.5, memory_share=0.5, overhead_s=1e-5, evidence=Evidence(source="test", error=0.1)
    )
    local = DeviceProfile(
        name="local",
        kind="cpu",
        architecture="cpu",
        memory_bytes=2**36,
        bandwidth_bytes_per_s=30e9,
        peak_flops_per_s={"16bit": 1e12},
        multiprocessors=2,
        gemm={"powerband": {"none": measured, "int4": measured}},
    )
    here = SearchSpace(
        profiles=[local],
        engines=["powerband"],
        max_devices=1,
        max_model_len=4096,
        quantizations=("none", "int8", "int4"),
    )
    found, pruned = replica_options(LLAMA_8B, CheckpointPrecision(), here)
    assert {option.replica.quantization for option in found} == {"none", "int4"}
    assert "int8 could not be measured well enough on this machine" in reason(pruned, "powerband on local in int8")
