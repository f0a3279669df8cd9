"""Memory of a rank: what vLLM measured at its start, what our own engine prints, and what no device can hold."""

from __future__ import annotations

import csv
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model_configs import model_config
from powerband.cost.memory import plan_memory
from powerband.cost.replica_memory import kv_bytes_per_token, plan_replica, weight_bytes
from powerband.spec.deployment import Replica
from powerband.spec.hardware.catalog import load_catalog
from powerband.spec.model.counts import count_parameters
from powerband.spec.model.model_spec import ModelSpec
from powerband.spec.model.reader import read_model_spec
from powerband.spec.settings import EngineSettings

DATA = Path(os.environ.get("ACCURACY_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def shape(*sizes: int, **more: Any) -> ModelSpec:
    return read_model_spec(model_config(*sizes, **more))


LLAMA_70B = shape(8192, 80, 64, 8, 28672, 128256)
MODELS = {
    "meta-llama/Llama-2-7b-hf": shape(4096, 32, 32, 32, 11008, 32000),
    "mistralai/Mistral-Nemo-Instruct-2407": shape(
        5120, 40, 32, 8, 14336, 131072, head_dim=128, model_type="mistral", max_position_embeddings=131072
    ),
    "Qwen/Qwen2.5-7B-Instruct": shape(3584, 28, 28, 4, 18944, 152064, model_type="qwen2"),
}
LLAMA_8B = shape(4096, 32, 32, 8, 14336, 128256)
H100, L4 = load_catalog().find("H100"), load_catalog().find("L4")


def test_vllm_holds_as_many_tokens_as_it_reported() -> None:
    if not (DATA / "kv_capacity.csv").exists():
        pytest.skip("the measured tables are not beside this checkout")
    with (DATA / "kv_capacity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        replica = Replica(
            device="H100",
            tensor_parallel=int(row["tp"]),
            max_model_len=4096,
            max_num_seqs=int(row["max_num_seqs"]),
            max_num_batched_tokens=int(row["max_num_batched_tokens"]),
            gpu_memory_utilization=float(row["gpu_memory_utilization"]),
        )
        memory = plan_replica(MODELS[row["model"]], H100, replica, "vllm")
        assert memory.kv_tokens == pytest.approx(int(row["kv_tokens"]), rel=0.03)


def test_our_own_engine_gets_the_plan_that_it_prints() -> None:
    replica = Replica(device="H100", max_model_len=8192, max_num_seqs=64)
    printed = plan_memory(LLAMA_8B, EngineSettings(max_model_len=8192, max_num_seqs=64), H100.memory_bytes, kind="cuda")
    assert plan_replica(LLAMA_8B, H100, replica, "powerband").num_blocks == printed.num_blocks


def test_ranks_share_layers_heads_and_vocabulary() -> None:
    whole = weight_bytes(LLAMA_70B, Replica(device="H100", max_model_len=8192))
    assert whole == count_parameters(LLAMA_70B).total * 2
    quarter = weight_bytes(LLAMA_70B, Replica(device="H100", tensor_parallel=4, max_model_len=8192))
    assert quarter == pytest.approx(whole / 4, rel=0.001)
    stages = weight_bytes(LLAMA_70B, Replica(device="H100", pipeline_parallel=4, max_model_len=8192))
    assert stages == pytest.approx(whole / 4, rel=0.04)


def test_heads_of_keys_are_copied_when_there_are_fewer_than_ranks() -> None:
    one = kv_bytes_per_token(LLAMA_70B, Replica(device="H100", max_model_len=8192))
    assert one == 327_680  # planners' published figure for this model
    assert kv_bytes_per_token(LLAMA_70B, Replica(device="H100", tensor_parallel=16, max_model_len=8192)) == one // 8


def test_what_does_not_fit_says_what_it_needs() -> None:
    memory = plan_replica(LLAMA_70B, L4, Replica(device="L4", max_model_len=8192), "vllm")
    assert memory.problem.startswith("needs 14")
    assert "has 21.4 GB" in memory.problem
    assert (
        "heads cannot be divided"
        in plan_replica(LLAMA_8B, L4, Replica(device="L4", tensor_parallel=3, max_model_len=8192), "vllm").problem
    )


def test_offloading_makes_a_13b_model_fit_one_card_of_24_gb() -> None:
    llama_13b = shape(5120, 40, 40, 40, 13824, 32000, max_position_embeddings=4096)
    replica = Replica(device="L4", max_model_len=4096, max_num_seqs=8)
    assert plan_replica(llama_13b, L4, replica, "vllm").problem
    assert not plan_replica(llama_13b, L4, replace(replica, offload_share=0.5), "vllm").problem


@pytest.mark.parametrize("engine", ["powerband", "vllm", "trtllm"])
def test_more_memory_never_holds_less(engine: str) -> None:
    replica = Replica(device="H100", max_model_len=2048)
    held = [
        plan_replica(LLAMA_8B, replace(H100, memory_bytes=size << 30), replica, engine).kv_tokens  # type: ignore[arg-type] # one of its names
        for size in (24, 32, 48, 80, 141)
    ]
    assert held == sorted(held)
    assert held[0] < held[-1]
