"""How well the planner's simulator knows our own engine on this machine: predicted beside measured over HTTP.

    python -m benchmarks.accuracy_own                      # about half an hour; best on an idle machine
    python -m benchmarks.accuracy_own --models demo --seconds 15 --profile kept.yaml

For each model: `powerband calibrate`, then two workloads at three rates up to 90 % of the capacity that the simulator
tells: the presets' with shorter texts, since this is a CPU. Each load is sent by the load generator to `powerband
serve`, and the same schedule is simulated, with prompts as long as the server counted them. Errors are
|predicted - measured| / measured. A measurement is in its band when it lies between the simulations with every time
shorter and longer by the model's band.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.cpu.checkpoint import write_tokenizer
from benchmarks.cpu.shapes import QWEN3_06B

from powerband.calibration.server import CalibrationServer, calibration_server
from powerband.cost.latency import LatencyModel
from powerband.cost.memory import plan_memory
from powerband.metrics.record import Outcome, RequestRecord, percentile
from powerband.planner.simulation.inputs import SimulationInputs
from powerband.planner.simulation.simulator import NO_GATEWAY
from powerband.spec.deployment import Deployment, Replica, ReplicaPool
from powerband.spec.hardware.catalog import read_profile
from powerband.spec.hardware.device import detect_cpu
from powerband.spec.model.reader import read_model_spec
from powerband.spec.settings import EngineSettings
from powerband.spec.workload.arrivals import ClosedLoop, OpenLoop
from powerband.spec.workload.lengths import Fixed, Uniform
from powerband.spec.workload.presets import preset
from powerband.spec.workload.schedule import Schedule
from powerband.spec.workload.workload import RequestMix, SharedPrefix, Workload

RESULT = Path(__file__).parent / "results" / "accuracy-own.json"
SHARES = (0.3, 0.6, 0.9)  # of the capacity
USERS = 48  # of the closed loop that tells the capacity
RESOLUTION = 0.005
MEDIAN, WORST, IN_BAND = 0.05, 0.15, 0.9
# Lengths instead of the presets': prompts, answers, what prompts share. By model and preset.
LENGTHS = {
    "demo": {"chat": ((32, 256), (16, 96), 64), "rag": ((256, 1200), (8, 48), 128)},
    "qwen3-0.6b": {"chat": ((32, 256), (16, 64), 64), "rag": ((256, 1200), (8, 32), 128)},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "demo": {"kv_cache_memory": "192MiB", "max_num_seqs": 64},
    "qwen3-0.6b": {"kv_cache_memory": "2560MiB", "max_num_seqs": 32, "max_model_len": 4096, "load_format": "dummy"},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo,qwen3-0.6b")
    parser.add_argument("--seconds", type=float, default=50.0, help="of each load")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--profile", type=Path, help="use this one, do not calibrate")
    parser.add_argument("--calibrate-seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="powerband-accuracy-") as folder:
        report = asyncio.run(run(arguments, Path(folder)))
    print_summary(report)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


async def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    cpu = detect_cpu()
    report: dict[str, Any] = {
        "machine": {"cpu": cpu.name, "cores": cpu.cores, "features": list(cpu.features)},
        "versions": {name: version(name) for name in ("powerband", "torch")},
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "seed": arguments.seed,
        "seconds": arguments.seconds,
        "calibration_s": {},
        "figures": [],
    }
    profile = arguments.profile or folder / "local.yaml"
    for name in arguments.models.split(","):
        model = "demo" if name == "demo" else str(dummy_model(folder / name))
        if arguments.profile is None:
            report["calibration_s"][name] = calibrate(model, name, profile, arguments.calibrate_seconds)
        modelled = model_of(model, name, profile)
        print(f"\n{name}: band ±{modelled.band:.0%}, host {modelled.models[0].host}")
        place = folder / f"serve-{name}"
        place.mkdir()
        async with calibration_server(model, SETTINGS[name], place) as served:
            await served.touch(modelled.num_blocks[0] * modelled.block_size, 30.0)
            for preset_name in LENGTHS[name]:
                report["figures"] += await one_preset(name, preset_name, modelled, served, arguments)
    return report


def dummy_model(folder: Path) -> Path:
    """Qwen3-0.6B's shape and a tokenizer of its size; weights are made up when it is loaded."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3_06B.config))
    write_tokenizer(QWEN3_06B.config["vocab_size"], folder)
    return folder


def calibrate(model: str, name: str, profile: Path, seconds: float) -> float:
    """As a user does: the machine first, then the model. Returns the seconds of the model's."""
    options = [f"--{key.replace('_', '-')}={value}" for key, value in SETTINGS[name].items()]
    base = [sys.executable, "-m", "powerband", "calibrate"]
    if not profile.exists():
        began_s = time.perf_counter()
        subprocess.run([*base, "-o", str(profile), f"--seconds={seconds}"], check=True)
        print(f"machine calibrated in {time.perf_counter() - began_s:.0f} s")
    began_s = time.perf_counter()
    subprocess.run([*base, model, "-o", str(profile), f"--seconds={seconds}", *options], check=True)
    return time.perf_counter() - began_s


def model_of(model: str, name: str, profile: Path) -> SimulationInputs:
    """As the planner has it."""
    spec = read_model_spec(model if name != "demo" else Path(__file__).parents[1] / "src" / "powerband" / "demo")
    known = read_profile(profile)
    settings = EngineSettings(model=model, dtype="bfloat16", **SETTINGS[name])
    memory = plan_memory(spec, settings, known.memory_bytes, kind="cpu", dtype="bfloat16")
    replica = Replica(
        device="local",
        max_model_len=memory.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
    )
    deployment = Deployment(engine="powerband", pools=(ReplicaPool(replica=replica),))
    latency = LatencyModel(spec, known, replica, "powerband")
    return SimulationInputs(deployment, (latency,), (memory.num_blocks,), memory.block_size)


async def one_preset(
    name: str, preset_name: str, modelled: SimulationInputs, served: CalibrationServer, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    workload = workload_of(name, preset_name)
    capacity = capacity_of(workload, modelled, arguments.seconds)
    print(f"\n{name} {preset_name}: capacity {capacity:.3g} requests/s by the simulator")
    print(f"{'rate':>6} {'figure':<12} {'measured':>10} {'predicted':>10} {'error':>8}  in band")
    rows = []
    for share in SHARES:
        rate = share * capacity
        burstiness = preset(preset_name).burstiness
        asked = replace(workload, arrivals=OpenLoop.at(rate, burstiness))
        schedule = asked.draw(arguments.seed, duration_s=arguments.seconds)
        load = await served.load(schedule)
        records = [sample.record() for sample in load.result.samples]
        if any(record.outcome is not Outcome.OK for record in records):
            print("!! not every request was answered")
        measured = figures(records)
        counted = as_counted(schedule, records)
        middle, fast, slow = (
            figures(modelled.simulate(counted, slowdown=slowdown, options=NO_GATEWAY).records)
            for slowdown in (1.0, 1 / (1 + modelled.band), 1 + modelled.band)
        )
        for figure, value in measured.items():
            # As planning shows it; a band narrower than what a clock can tell is none.
            edges = (middle[figure], fast[figure], slow[figure])
            low, high = min(edges) * (1 - RESOLUTION), max(edges) * (1 + RESOLUTION)
            row = {
                "model": name,
                "workload": preset_name,
                "rate": rate,
                "share": share,
                "figure": figure,
                "measured": value,
                "predicted": middle[figure],
                "error": middle[figure] / value - 1,
                "low": low,
                "high": high,
                "in_band": low <= value <= high,
                "requests": len(records),
            }
            rows.append(row)
            unit, scale = ("tok/s", 1.0) if figure == "throughput" else ("ms", 1e3)
            shown = f"{scale * value:>10.2f} {scale * middle[figure]:>10.2f} {row['error']:>+8.1%}"
            print(f"{rate:>6.3g} {figure:<12} {shown}  {'yes' if row['in_band'] else 'NO'} {unit}", flush=True)
    return rows


def as_counted(schedule: Schedule, records: list[RequestRecord]) -> Schedule:
    """The same requests, each prompt as long as the server counted it: words that are made up are never exactly as many
    tokens as was asked for. Only for requests without conversations, in which each is a chain of its own.
    """
    asked = sum(segment.tokens for chain in schedule.chains for r in chain.requests for segment in r.segments)
    scale = sum(record.prompt_tokens for record in records) / asked
    chains = []
    for chain, record in zip(schedule.chains, records, strict=True):
        [request] = chain.requests
        *shared, own = request.segments
        shared = [replace(segment, tokens=round(segment.tokens * scale)) for segment in shared]
        own = replace(own, tokens=max(record.prompt_tokens - sum(segment.tokens for segment in shared), 1))
        chains.append(replace(chain, requests=(replace(request, segments=(*shared, own)),)))
    return replace(schedule, chains=tuple(chains))


def workload_of(name: str, preset_name: str) -> Workload:
    prompts, answers, shared = LENGTHS[name][preset_name]
    mix = RequestMix(Uniform(*prompts), Uniform(*answers), SharedPrefix(Fixed(shared)))
    return Workload(name=preset_name, arrivals=ClosedLoop(USERS), requests=mix)


def capacity_of(workload: Workload, modelled: SimulationInputs, seconds: float) -> float:
    """Requests a second of users who do not wait."""
    schedule: Schedule = workload.draw(0, duration_s=min(seconds, 30.0))
    records = modelled.simulate(schedule, options=NO_GATEWAY).records
    return len(records) / max(record.chunk_times_s[-1] for record in records)


def figures(records: list[RequestRecord]) -> dict[str, float]:
    """Of all requests. Throughput: output tokens until the last one, a second."""
    found: dict[str, float] = {}
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        values = [value for record in records if (value := getattr(record, name)) is not None]
        found[f"{name[:-2]} mean"] = math.fsum(values) / len(values)
        found[f"{name[:-2]} p95"] = percentile(values, 95)
    end_s = max(record.chunk_times_s[-1] for record in records)
    start_s = min(record.scheduled_s for record in records)
    found["throughput"] = sum(record.output_tokens for record in records) / (end_s - start_s)
    return found


def print_summary(report: dict[str, Any]) -> None:
    rows = report["figures"]
    report["summary"] = {}
    groups = {"all": rows} | {name: [r for r in rows if r["model"] == name] for name in {r["model"] for r in rows}}
    groups |= {
        kind: [r for r in rows if r["figure"].startswith(kind)] for kind in ("ttft", "tpot", "e2e", "throughput")
    }
    print(f"\n{'group':<12} {'n':>4} {'median':>8} {'mean':>8} {'P90':>8} {'worst':>8} {'bias':>8} {'in band':>8}")
    for name, group in groups.items():
        sizes = [abs(row["error"]) for row in group]
        found = {
            "n": len(group),
            "median": statistics.median(sizes),
            "mean": statistics.fmean(sizes),
            "p90": percentile(sizes, 90),
            "worst": max(sizes),
            "bias": statistics.fmean(row["error"] for row in group),
            "in_band": sum(row["in_band"] for row in group) / len(group),
        }
        report["summary"][name] = found
        shares = " ".join(f"{found[key]:>8.1%}" for key in ("median", "mean", "p90", "worst"))
        print(f"{name:<12} {found['n']:>4} {shares} {found['bias']:>+8.1%} {found['in_band']:>8.0%}")
    whole = report["summary"]["all"]
    kept = whole["median"] <= MEDIAN and whole["worst"] <= WORST and whole["in_band"] >= IN_BAND
    print(
        f"goal (median {MEDIAN:.0%}, worst {WORST:.0%}, {IN_BAND:.0%} in band): {'reached' if kept else 'NOT reached'}"
    )


if __name__ == "__main__":
    sys.exit(main())
