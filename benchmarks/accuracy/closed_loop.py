"""e2e_closed_loop.csv: TPOT and TTFT of a fixed number of users, each asking again as soon as it is answered."""

from __future__ import annotations

import random
from dataclasses import dataclass
from statistics import mean

from benchmarks.accuracy import models, tables

from powerband.cost.latency import LatencyModel
from powerband.cost.replica_memory import plan_replica
from powerband.planner.simulation.simulator import NO_GATEWAY, simulate
from powerband.spec.deployment import Deployment, EngineName, Replica, ReplicaPool
from powerband.spec.workload.schedule import Chain, PlannedRequest, Schedule, Segment

# Requests of each user: InferenceX sends ten times as many as there are users; for the others nothing is told.
_ROUNDS, _ROUNDS_INFERENCEX = 10, 10


@dataclass(frozen=True, slots=True)
class Row:
    group: tuple[str, ...]  # system, backend, model, dtype, tp
    users: int
    prompt: int
    answer: int
    varied: bool  # InferenceX: lengths uniform in [0.8, 1] of the nominal
    tpot_s: float
    ttft_s: float


def rows() -> list[Row]:
    return [
        Row(
            (r["system"], r["backend"], r["model"], r["dt"], r["tp"]),
            int(r["C"]),
            int(r["isl"]),
            int(r["osl"]),
            r["inferencex"] == "True",
            float(r["meas_tpot_ms"]) / 1e3,
            float(r["meas_ttft_ms"]) / 1e3,
        )
        for r in tables.read("e2e_closed_loop.csv")
    ]


@dataclass(frozen=True, slots=True)
class Predicted:
    tpot_s: float
    ttft_s: float
    band: float


def replica(row: Row) -> tuple[Replica, EngineName]:
    """The settings of a row. NVIDIA's FP8 checkpoints have static scales; TensorRT-LLM then keeps its cache in FP8."""
    _, backend, _, dtype, ranks = row.group
    engine: EngineName = "trtllm" if backend == "trtllm" else "vllm" if backend == "vllm" else "sglang"
    return Replica(
        device="x",
        tensor_parallel=int(ranks),
        quantization="none" if dtype == "bfloat16" else "fp8_static",
        kv_precision="fp8" if engine == "trtllm" and dtype == "fp8" else "16bit",
        max_model_len=row.prompt + row.answer,
        max_num_seqs=max(256, row.users),
        max_num_batched_tokens=8192 if engine == "vllm" else row.users + row.prompt + 1500,
        enable_prefix_caching=False,
    ), engine


def predict(row: Row) -> Predicted:
    """By the simulator, on the engine's own scheduler."""
    layout, engine = replica(row)
    profile, model = tables.device(row.group[0]), models.spec(row.group[2])
    costs = LatencyModel(model, profile, layout, engine)
    memory = plan_replica(model, profile, layout, engine)
    played = simulate(
        _schedule(row),
        Deployment(engine=engine, pools=(ReplicaPool(replica=layout),)),
        [costs],
        [memory.num_blocks],
        memory.block_size,
        options=NO_GATEWAY,
    )
    return Predicted(
        mean(record.tpot_s or 0.0 for record in played.records),
        mean(record.ttft_s or 0.0 for record in played.records),
        costs.band,
    )


def closed_form(row: Row) -> Predicted:
    """As a search prunes: a step of all users' decodes, and each answer's share of a prefill."""
    layout, engine = replica(row)
    costs = LatencyModel(models.spec(row.group[2]), tables.device(row.group[0]), layout, engine)
    share = 0.9 if row.varied else 1.0
    prompt, answer = int(row.prompt * share), int(row.answer * share)
    step_s = costs.step_s([(1, prompt + answer // 2)] * row.users, row.users)
    prefill_s = costs.step_s([(prompt, prompt)], 1)
    return Predicted(step_s + row.users / answer * prefill_s, prefill_s, costs.band)


def _schedule(row: Row) -> Schedule:
    generator = random.Random(row.users)
    index = 0
    chains = []
    for user in range(row.users):
        requests = []
        for turn in range(_ROUNDS_INFERENCEX if row.varied else _ROUNDS):
            low = 0.8 if row.varied else 1.0
            prompt, answer = (max(2, round(n * generator.uniform(low, 1.0))) for n in (row.prompt, row.answer))
            requests.append(PlannedRequest(index, (Segment(f"{user}/{turn}", prompt),), answer))
            index += 1
        chains.append(Chain(0.0, tuple(requests)))
    return Schedule(0, tuple(chains), float("inf"))
