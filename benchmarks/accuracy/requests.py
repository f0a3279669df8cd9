"""e2e_requests.csv: 300 requests with their arrivals, played through the simulator one for one."""

from __future__ import annotations

from benchmarks.accuracy import models, tables

from powerband.cost.latency import LatencyModel
from powerband.cost.replica_memory import plan_replica
from powerband.metrics.record import percentile
from powerband.planner.simulation.simulator import NO_GATEWAY, simulate
from powerband.spec.deployment import Deployment, Replica, ReplicaPool
from powerband.spec.workload.schedule import Chain, PlannedRequest, Schedule, Segment

FIGURES = ("ttft", "tpot", "e2e")
STATISTICS = ("mean", "p50", "p90", "p99")


def compare() -> dict[str, dict[str, tuple[float, float]]]:
    """figure → statistic → (predicted, measured), in seconds."""
    rows = sorted(tables.read("e2e_requests.csv"), key=lambda row: float(row["arrival_s"]))
    # vLLM's own token budget of 2,048; what else is set stands in the table.
    layout = Replica(
        device="x", max_model_len=8192, max_num_seqs=int(rows[0]["max_num_seqs"]), max_num_batched_tokens=2048
    )
    profile, spec = tables.device("RTXPRO6000"), models.spec("llama-3.1-8b")
    memory = plan_replica(spec, profile, layout, "vllm")
    chains = tuple(
        Chain(
            float(row["arrival_s"]),
            (PlannedRequest(index, (Segment(f"{index}", int(row["input_tokens"])),), int(row["output_tokens"])),),
        )
        for index, row in enumerate(rows)
    )
    played = simulate(
        Schedule(0, chains, float("inf")),
        Deployment(engine="vllm", pools=(ReplicaPool(replica=layout),)),
        [LatencyModel(spec, profile, layout, "vllm")],
        [memory.num_blocks],
        memory.block_size,
        options=NO_GATEWAY,
    )
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for figure in FIGURES:
        predicted = [getattr(record, f"{figure}_s") for record in played.records]
        measured = [float(row[f"{figure}_ms"]) / 1e3 for row in rows]
        found[figure] = {name: (_statistic(predicted, name), _statistic(measured, name)) for name in STATISTICS}
    return found


def _statistic(values: list[float], name: str) -> float:
    return sum(values) / len(values) if name == "mean" else percentile(values, float(name[1:]))
