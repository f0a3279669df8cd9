"""kv_capacity.csv: blocks of KV cache that vLLM reported at its start."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.accuracy import models, tables

from powerband.cost.replica_memory import plan_replica
from powerband.spec.deployment import Replica
from powerband.spec.hardware.catalog import load_catalog

_MODELS = {
    "meta-llama/Llama-2-7b-hf": "llama-2-7b",
    "mistralai/Mistral-Nemo-Instruct-2407": "mistral-nemo",
    "Qwen/Qwen2.5-7B-Instruct": "qwen2.5-7b",
}


def compare() -> Iterator[tuple[str, float, float]]:
    """(what, predicted, measured)."""
    for row in tables.read("kv_capacity.csv"):
        layout = Replica(
            device="x",
            tensor_parallel=int(row["tp"]),
            max_model_len=4096,
            max_num_seqs=int(row["max_num_seqs"]),
            max_num_batched_tokens=int(row["max_num_batched_tokens"]),
            gpu_memory_utilization=float(row["gpu_memory_utilization"]),
        )
        plan = plan_replica(models.spec(_MODELS[row["model"]]), load_catalog().find("H100"), layout, "vllm")
        tokens = float(row["num_gpu_blocks"]) * int(row["block_size"])
        yield f"{row['model']} tp{row['tp']}", plan.kv_tokens, tokens
