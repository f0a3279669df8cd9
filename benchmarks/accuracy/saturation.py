"""e2e_measured.csv: the most output tokens a second that an engine gives when thousands of requests are queued."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.accuracy import models, tables

from powerband.cost.latency import LatencyModel
from powerband.cost.replica_memory import plan_replica
from powerband.spec.deployment import Replica
from powerband.spec.hardware.catalog import load_catalog

_DEVICES = {"H200": "H200", "H100": "H100", "A100-SXM-80": "A100-80G", "A100-PCIe-80": "A100-80G-PCIe", "L40S": "L40S"}
# As TensorRT-LLM's benchmark page says that they were run: batch up to 2048, 8192 tokens a step, 95 % of free memory.
_MAX_SEQS, _MAX_TOKENS, _MEMORY_SHARE = 2048, 8192, 0.95


@dataclass(frozen=True, slots=True)
class Row:
    group: tuple[str, ...]  # gpu, model, precision, tp
    prompt: int
    answer: int
    tokens_per_s: float


def rows() -> list[Row]:
    return [
        Row(
            (r["gpu"], r["model"].lower(), r["precision"], r["tp"]),
            int(r["isl"]),
            int(r["osl"]),
            float(r["out_tok_s"]),
        )
        for r in tables.read("e2e_measured.csv")
        if r["mode"] == "offline-max"
    ]


def predict(row: Row) -> tuple[float, float] | None:
    """(output tokens a second, band); None: it does not fit.

    Steps that all are alike: as many decodes as the cache holds of requests in the middle of their answers, and the
    share of new prompts that keeps up with those that end.
    """
    gpu, model, precision, ranks = row.group
    narrow = precision == "fp8"
    layout = Replica(
        device="x",
        tensor_parallel=int(ranks),
        quantization="fp8_static" if narrow else "none",
        kv_precision="fp8" if narrow else "16bit",
        max_model_len=row.prompt + row.answer,
        max_num_seqs=_MAX_SEQS,
        max_num_batched_tokens=_MAX_TOKENS,
        gpu_memory_utilization=_MEMORY_SHARE,
    )
    spec, profile = models.spec(model), load_catalog().find(_DEVICES[gpu])
    memory = plan_replica(spec, profile, layout, "trtllm")
    if memory.problem:
        return None
    costs = LatencyModel(spec, profile, layout, "trtllm")
    held = memory.kv_tokens / (row.prompt + row.answer / 2)
    users = max(1, int(min(held, _MAX_SEQS)))
    step_s = costs.step_s([(1, row.prompt + row.answer // 2)] * users, users)
    at_once = max(1, (_MAX_TOKENS - users) // row.prompt) if row.prompt <= _MAX_TOKENS else 1
    at_once = min(at_once, users)
    prefill_s = costs.step_s([(row.prompt, row.prompt)] * at_once, at_once) / at_once
    host_s = costs.host.step_s + costs.host.per_request_s * users
    decode_s = max(step_s, host_s) if costs.host.overlapped else step_s + host_s
    seconds = decode_s + users / row.answer * prefill_s
    return users / seconds, costs.band
