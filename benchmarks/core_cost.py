"""What the scheduler itself costs: CPU microseconds per running request and step, for schedule and update.

    python benchmarks/core_cost.py

First table: all requests decode at once in overlap mode (depth 2, relay 1), the steady state of a busy engine. Only
`schedule` and `update` are timed, with the process's CPU time; the loop and the simulated device are not. The median
and the spread are over repetitions. The limit this project sets itself is 10 µs at 64 and at 256 requests.

Second table: one step while 2000 requests wait, by policy. Those whose order changes over time sort them anew.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from pathlib import Path

from powerband.core.admission import SchedulerLimits
from powerband.core.kv_cache import KVCacheManager
from powerband.core.params import SamplingParams
from powerband.core.policy import POLICY_NAMES, make_policy
from powerband.core.request import EngineRequest
from powerband.core.scheduler import Scheduler
from powerband.core.step import Step, StepResult

LIMIT_US = 10.0
BLOCK_SIZE = 32


def decoding(num_requests: int, num_steps: int) -> Scheduler:
    """Return a scheduler whose requests have all sampled their first token and will decode `num_steps` more."""
    length = 64 + num_steps + 16
    kv = KVCacheManager(num_requests * (length // BLOCK_SIZE + 2), BLOCK_SIZE)
    limits = SchedulerLimits(max_model_len=length, max_num_seqs=num_requests, max_num_batched_tokens=64 * num_requests)
    scheduler = Scheduler(kv, limits, relay=1)
    for i in range(num_requests):
        params = SamplingParams(max_tokens=None, eos_token_ids=[1, 2])
        tokens = [7 + i, *range(63)]
        scheduler.add(EngineRequest(id=f"request-{i:05d}", token_ids=tokens, params=params, arrival_s=0.0), 0.0)
    return scheduler


def measure(num_requests: int, num_steps: int) -> float:
    """Return microseconds of schedule + update per request and step."""
    scheduler = decoding(num_requests, num_steps)
    seconds = 0.0
    inflight: list[Step] = []
    gc.collect()
    for k in range(num_steps):
        start = time.process_time()
        step = scheduler.schedule(0.0)
        seconds += (time.process_time() - start) * (k > 1)
        assert step is not None
        assert len(step.works) == num_requests
        inflight.append(step)
        if len(inflight) == 2:
            oldest = inflight.pop(0)
            result = StepResult({work.id: [9] for work in oldest.works})
            start = time.process_time()
            scheduler.update(oldest, result, 0.0)
            seconds += (time.process_time() - start) * (k > 1)
    return seconds / (num_steps - 2) / num_requests * 1e6


def measure_queue(policy: str) -> float:
    """Return microseconds per step with about 64 decoding requests, and 2000 that wait for blocks, not for seats."""
    kv = KVCacheManager(64 * 7, BLOCK_SIZE)
    limits = SchedulerLimits(max_model_len=256, max_num_seqs=256, max_num_batched_tokens=16384)
    scheduler = Scheduler(kv, limits, policy=make_policy(policy, kv))
    for i in range(2064):
        tokens = [i, *range(191)]
        params = SamplingParams(max_tokens=None)
        source = EngineRequest(id=f"{i:05d}", token_ids=tokens, params=params, arrival_s=0.001 * i, tenant=str(i % 5))
        scheduler.add(source, 0.0)
    seconds = 0.0
    for k in range(50):
        start = time.process_time()
        step = scheduler.schedule(3.0)
        assert step is not None
        scheduler.update(step, StepResult({work.id: [9] for work in step.works if work.samples}), 3.0)
        seconds += (time.process_time() - start) * (k >= 10)
    return seconds / 40 * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "core_cost.json")
    arguments = parser.parse_args()
    rows = []
    print("requests   µs per request and step   (min .. max)   limit")
    for num_requests in (1, 16, 64, 256, 1024):
        num_steps = max(100, min(2000, 40_000 // num_requests))
        costs = sorted(measure(num_requests, num_steps) for _ in range(arguments.repetitions))
        rows.append({"num_requests": num_requests, "num_steps": num_steps, "us_per_request_step": costs})
        limit = f"{LIMIT_US:.0f}" if num_requests in (64, 256) else ""
        print(f"{num_requests:8d} {statistics.median(costs):15.2f} {costs[0]:17.2f} .. {costs[-1]:.2f}   {limit}")
    queues = {policy: sorted(measure_queue(policy) for _ in range(arguments.repetitions)) for policy in POLICY_NAMES}
    print("\npolicy           µs per step, 2000 waiting   (min .. max)")
    for policy, costs in queues.items():
        print(f"{policy:15s} {statistics.median(costs):18.0f} {costs[0]:20.0f} .. {costs[-1]:.0f}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "benchmark": "core_cost",
        "seed": None,  # nothing is random
        "machine": {"processor": _processor(), "system": platform.platform()},
        "versions": {"python": platform.python_version()},
        "limit_us": LIMIT_US,
        "rows": rows,
        "us_per_step_with_2000_waiting": queues,
    }
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
