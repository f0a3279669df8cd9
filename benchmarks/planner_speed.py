"""How fast the planner is: simulated requests a second on one core, and candidates of a search on all of them.

    python benchmarks/planner_speed.py                    # both
    python benchmarks/planner_speed.py --only simulator

The simulator plays 1,000 requests of the preset chat on Llama-3-8B's shape on one A100 (vLLM, 16 bits), which answers
some tens at once: every step of them, in the engine's own scheduler. Also without doing steps that are alike at once,
which gives the same records. Goal: at most 1 s of one core. The search is that of `powerband plan` over several devices
and engines: seconds until the first answer, and in all. Goals: 3 s, and 60 s for 1,000 candidates on two cores.
Others, as published or measured by us: inference-sim 5.7 s for an experiment, AIConfigurator 10 to 44 ms for the means
of one configuration.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from powerband.cost.latency import LatencyModel
from powerband.cost.replica_memory import plan_replica
from powerband.planner.plan_request import PlanRequest
from powerband.planner.search import search
from powerband.planner.simulation.simulator import Simulation, simulate
from powerband.spec.deployment import Deployment, Replica, ReplicaPool
from powerband.spec.hardware.catalog import load_catalog
from powerband.spec.model.checkpoint_precision import CheckpointPrecision
from powerband.spec.model.model_spec import ModelSpec
from powerband.spec.model.reader import read_model_spec
from powerband.spec.slo import SLO
from powerband.spec.workload.arrivals import OpenLoop
from powerband.spec.workload.presets import preset
from powerband.spec.workload.schedule import Schedule
from powerband.spec.workload.workload import Workload

SEED, REQUESTS = 0, 1000
DEVICES, RATE = ("L4", "A10G", "L40S", "A100-80G", "H100", "H200"), 8.0
GOAL_S, GOAL_FIRST_S, GOAL_SEARCH_S = 1.0, 3.0, 60.0
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
}
# (what, preset, requests a second, device, replicas, stages, drafts)
CASES = [
    ("chat", "chat", 5.0, "A100-80G", 1, 1, 0),
    ("chat, near saturation", "chat", 8.0, "A100-80G", 1, 1, 0),
    ("chat, 8 replicas", "chat", 8.0, "L4", 8, 1, 0),
    ("chat, 4 pipeline stages", "chat", 3.0, "L4", 1, 4, 0),
    ("chat, 3 drafts", "chat", 5.0, "A100-80G", 1, 1, 3),
    ("conversation", "conversation", 10.0, "A100-80G", 1, 1, 0),
    ("rag", "rag", 2.0, "A100-80G", 1, 1, 0),
]


def workload(name: str, rate: float) -> Workload:
    chosen = preset(name)
    return Workload(name=name, arrivals=OpenLoop.at(rate, chosen.burstiness), requests=chosen.mix)


def player(
    spec: ModelSpec, schedule: Schedule, device: str, count: int, stages: int, drafts: int
) -> Callable[[bool], Simulation]:
    profile = load_catalog().find(device)
    replica = Replica(
        device=profile.name,
        max_model_len=8192,
        pipeline_parallel=stages,
        draft_tokens=drafts,
        draft_acceptance=0.7 if drafts else 0.0,
    )
    memory = plan_replica(spec, profile, replica, "vllm")
    model = LatencyModel(spec, profile, replica, "vllm")
    where = Deployment(engine="vllm", pools=(ReplicaPool(replica=replica, count=count),))
    return lambda fast_forward: simulate(
        schedule, where, [model], [memory.num_blocks], memory.block_size, fast_forward=fast_forward
    )


def timed(play: Callable[[bool], Simulation], fast_forward: bool, repetitions: int) -> dict[str, Any]:
    """CPU seconds of this process, which has one thread: a busy machine matters less."""
    samples, played = [], play(fast_forward)
    for _ in range(repetitions):
        start = time.process_time()
        played = play(fast_forward)
        samples.append(time.process_time() - start)
    steps = played.total("num_steps")
    return {
        "seconds": statistics.median(samples),
        "least": min(samples),
        "most": max(samples),
        "steps": int(steps),
        "mean_batch": sum(record.output_tokens for record in played.records) / steps,
        "simulated_s": played.seconds,
    }


def simulator(repetitions: int) -> list[dict[str, Any]]:
    spec, found = read_model_spec(LLAMA_8B), []
    for what, name, rate, device, count, stages, drafts in CASES:
        schedule = workload(name, rate).draw(SEED, num_requests=REQUESTS)
        play = player(spec, schedule, device, count, stages, drafts)
        for fast_forward in (True, False) if what == "chat" else (True,):
            result = {
                "case": what + (", step by step" if not fast_forward else ""),
                **timed(play, fast_forward, repetitions),
            }
            found.append(result)
            print(
                f"{result['case']:28} {result['seconds']:6.2f} s ({result['least']:.2f} to {result['most']:.2f})"
                f"   {result['steps']:6d} steps of {result['mean_batch']:5.1f} requests,"
                f" {result['simulated_s']:5.0f} s simulated"
            )
    return found


def planning() -> dict[str, Any]:
    """A search over many candidates. The first answer is the best estimate, before anything is simulated."""
    chosen = workload("chat", RATE)
    plan_request = PlanRequest(
        model="Llama-3-8B",
        spec=read_model_spec(LLAMA_8B),
        stored=CheckpointPrecision(),
        profiles=[load_catalog().find(name) for name in DEVICES],
        engines=("vllm", "sglang"),
        workload=chosen,
        rate=RATE,
        slo=SLO(ttft_s=1.0, tpot_s=0.06),
        max_model_len=5120,
        seed=SEED,
    )
    started_s = time.perf_counter()
    first_s: list[float] = []

    def watch(_done: int, _total: int, text: str) -> None:
        if "first estimate" in text:
            first_s.append(time.perf_counter() - started_s)

    cpu_s = time.process_time()
    found = search(plan_request, progress=watch)
    seconds, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
    children = os.times()
    simulated = sum(evaluation.method == "simulation" for evaluation in found.evaluations)
    number, each_ms = len(found.evaluations), 1e3 * first_s[0] / len(found.evaluations)
    print(f"\nSearch over {', '.join(DEVICES)}, vLLM and SGLang, chat at {RATE:g}/s")
    print(f"  {number} candidates, {simulated} of them simulated, in {seconds:.1f} s ({GOAL_SEARCH_S:.0f} s for 1,000)")
    print(f"  first answer after {first_s[0]:.2f} s (goal {GOAL_FIRST_S:.0f} s), {each_ms:.2f} ms a candidate")
    return {
        "candidates": len(found.evaluations),
        "simulated": simulated,
        "seconds": seconds,
        "first_answer_s": first_s[0],
        "cpu_s": cpu_s + children.children_user + children.children_system,
        "goal_s": GOAL_SEARCH_S,
        "goal_first_answer_s": GOAL_FIRST_S,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", choices=("simulator",))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "planner-speed.json")
    options = parser.parse_args()
    print(f"CPU seconds of one core for {REQUESTS} requests, median of {options.repetitions} (least to most):")
    report = {
        "machine": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "seed": SEED,
        "requests": REQUESTS,
        "goal_s": GOAL_S,
        "simulator": simulator(options.repetitions),
        "search": planning() if options.only is None else None,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
