"""e2e_measured.csv, the blis-training rows: vLLM under a constant rate of chats of several turns.

What is told: rate, mean lengths, how many system prompts and users of each. Lengths' spread and how much of a prompt is
new in a turn are not: it is taken to be 64 tokens, and what came before to be cached. So there is no target, first
tokens are not compared, and neither are runs in which requests failed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean

from benchmarks.accuracy import models, tables

from powerband.cost.latency import LatencyModel
from powerband.cost.replica_memory import plan_replica
from powerband.planner.simulation.simulator import NO_GATEWAY, simulate
from powerband.spec.deployment import Deployment, Replica, ReplicaPool
from powerband.spec.hardware.catalog import load_catalog
from powerband.spec.workload.schedule import Chain, PlannedRequest, Schedule, Segment

_MODELS = {
    "meta-llama/Llama-2-7b-hf": "llama-2-7b",
    "meta-llama/Llama-2-70b-hf": "llama-2-70b",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral-8x7b",
    "codellama/CodeLlama-34b-Instruct-hf": "codellama-34b",
}
_SECONDS = 60.0  # of the runs, which last 10 minutes and more
_NEW = 64  # tokens of a prompt that are not cached


@dataclass(frozen=True, slots=True)
class Found:
    group: str
    tpot_s: tuple[float, float]  # predicted, measured
    e2e_s: tuple[float, float]
    band: float


def compare() -> Iterator[Found]:
    for row in tables.read("e2e_measured.csv"):
        if row["source"] == "blis-training" and "fail=0" in row["note"]:
            yield _compare(row)


def _compare(row: dict[str, str]) -> Found:
    spec, profile = models.spec(_MODELS[row["model"]]), load_catalog().find("H100")
    budget = int(re.search(r"mbt=(\d+)", row["note"])[1])  # type: ignore[index]
    layout = Replica(
        device="x",
        tensor_parallel=int(row["tp"]),
        max_model_len=4096,
        max_num_seqs=int(re.search(r"max_num_seqs=(\d+)", row["note"])[1]),  # type: ignore[index]
        max_num_batched_tokens=budget,
    )
    memory = plan_replica(spec, profile, layout, "vllm")
    costs = LatencyModel(spec, profile, layout, "vllm")
    deployment = Deployment(engine="vllm", pools=(ReplicaPool(replica=layout),))
    played = simulate(_schedule(row), deployment, [costs], [memory.num_blocks], memory.block_size, options=NO_GATEWAY)
    # The first third fills the engine.
    records = played.records[len(played.records) // 3 :]
    return Found(
        f"{_MODELS[row['model']]} tp{row['tp']}",
        (mean(r.tpot_s or 0.0 for r in records), float(row["tpot_ms"]) / 1e3),
        (mean(r.e2e_s or 0.0 for r in records), float(row["e2e_ms"]) / 1e3),
        costs.band,
    )


def _schedule(row: dict[str, str]) -> Schedule:
    rate, prompt, answer = float(row["request_rate"]), int(row["isl"]), int(row["osl"])
    told = re.search(r"x (\d+) prompts x (\d+) users", row["note"])
    conversations = int(told[1]) * int(told[2]) if told else 1
    chains = []
    for index in range(int(rate * _SECONDS)):
        before = Segment(f"conversation {index % conversations}", prompt - _NEW)
        request = PlannedRequest(index, (before, Segment(f"turn {index}", _NEW)), answer)
        chains.append(Chain(index / rate, (request,)))
    return Schedule(0, tuple(chains), float("inf"))
