"""Powerband beside OpenVINO GenAI, vLLM and llama.cpp on this CPU: one command installs, measures and compares.

    make bench-cpu                                     # everything; hours
    make bench-cpu ARGS="--quick"                      # what matters most
    make bench-cpu ARGS="--rows ac --engines powerband,openvino --precisions int8"
    make bench-cpu ARGS="--model llama-3.2-3b --rows ac"

Peers go into environments of their own in $BENCH_CPU_HOME (default: ~/.cache/powerband/bench), the models beside
them: the same random weights for all. Every run is a process with one engine: load, warm up, measure, exit; the engines
take turns. A figure is a median over the runs; its spread is (largest - smallest) / median. Rows wait for a quiet
machine and are repeated when other processes took more than 5 % of its CPU time. A peer that is more than 1.5 times as
slow as the best one in a row is not measured again in that row (--repeat-slow measures it).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cpu import engines, models, rows
from benchmarks.cpu.engines import Variant
from benchmarks.cpu.install import LLAMA, install
from benchmarks.cpu.limits import Limits, limit, sizes
from benchmarks.cpu.places import REPOSITORY, Places
from benchmarks.cpu.report import Figures, lines, machine, peers_table, table
from benchmarks.cpu.shapes import SHAPES, Shape
from benchmarks.cpu.steps import StepFailed, Steps

from powerband.engine.client.supervisor import ENVIRONMENT

SEED = 0
SLOW = 1.5
RUN_TIMEOUT_S = 3600.0


def main() -> int:
    args = arguments()
    shape, places = SHAPES[args.model], Places.default(args.llama_build, args.llama_sources)
    steps = Steps(places.home)
    wanted = engines.variants(args.engines, args.precisions)
    figures = Figures()
    ready = [variant for variant in wanted if prepare(variant, shape, places, steps, figures)]
    if args.prepare:
        return 1 if figures.failures else 0
    limits = Limits.build(places.home, args.threads)
    for turn in range(args.repetitions):
        limits.measure([size for precision in args.precisions for size in sizes(shape, precision)])
        slow = {} if args.repeat_slow or not turn else figures.slow_rows(ready, SLOW)
        for variant in ready:
            asked = "".join(row for row in args.rows if row in variant.rows and row not in slow.get(variant.name, ()))
            if asked:
                measure(variant, asked, turn, shape, places, args, figures)
        write(args, shape, ready, figures, limits)
    made = lines(figures, ready, args.rows, lambda metric, precision: limit(metric, shape, precision, limits))
    print(f"\n{shape.name}, {args.threads} threads, medians of up to {args.repetitions} runs\n\n{table(made)}")
    print(f"\nEvery engine:\n{peers_table(figures, ready, args.rows)}")
    for name, problem in figures.failures.items():
        print(f"\n{name} failed: {problem}", file=sys.stderr)
    return 1 if figures.failures else 0


def prepare(variant: Variant, shape: Shape, places: Places, steps: Steps, figures: Figures) -> bool:
    """Install the peer and make its model. False: it cannot take part, and the report says why."""
    try:
        if variant.peer:
            install(variant.peer, places, steps)
        models.make(variant, shape, places, steps)
    except StepFailed as problem:
        figures.failures[variant.name] = str(problem)
        print(problem, file=sys.stderr)
        return False
    return True


def measure(
    variant: Variant, asked: str, turn: int, shape: Shape, places: Places, args: argparse.Namespace, figures: Figures
) -> None:
    """One run of one variant; rows f and h in processes of their own. A start is timed after another, which has read
    all files into the file cache.
    """
    parts = ["".join(row for row in asked if row not in "fh"), *(row for row in asked if row in "fh")]
    for part in filter(None, parts):
        print(f"· round {turn + 1}: {variant.name}, rows {part} …", end="", flush=True)
        start = time.monotonic()
        try:
            if part == "f":
                run(variant, part, turn, shape, places, args)
            figures.add(variant.name, run(variant, part, turn, shape, places, args))
        except (RuntimeError, subprocess.TimeoutExpired) as problem:
            figures.failures[f"{variant.name} ({part})"] = str(problem)
            print(f" failed\n{problem}")
            continue
        seconds = time.monotonic() - start
        figures.seconds.setdefault(f"{variant.name} {part}", []).append(seconds)
        print(f" {seconds:.0f} s")


def run(
    variant: Variant, asked: str, turn: int, shape: Shape, places: Places, args: argparse.Namespace
) -> dict[str, Any]:
    """The worker's result. Raises RuntimeError with the end of what it printed."""
    tokens = rows.tokens_needed(asked, args.quick)
    longest = max(rows.CONTEXTS) + 512
    python = variant.python(places)
    with tempfile.TemporaryDirectory() as scratch:
        job, out = Path(scratch, "job.json"), Path(scratch, "out.json")
        message = {
            "kind": variant.kind,
            "model": str(places.model(shape.name, variant.form)),
            "options": variant.options,
            "rows": asked,
            "quick": args.quick,
            "guard": not args.no_guard,
            "threads": args.threads,
            "vocab": shape.config["vocab_size"],
            "kv_bytes": tokens * shape.kv_bytes_per_token("bf16"),
            "max_len": longest,
            "seed": SEED + turn,
            "python": python,
            "bin": str(places.llama_bin),
            "llama": LLAMA,
            "started_s": time.monotonic(),
        }
        job.write_text(json.dumps(message))
        command = [python, "-m", "benchmarks.cpu.worker", str(job), str(out)]
        env = os.environ | ({} if python == sys.executable else {"PYTHONPATH": ""})
        env |= {"OMP_NUM_THREADS": str(args.threads)} | (ENVIRONMENT if variant.is_ours else {})
        done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
        if done.returncode or not out.is_file():
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-12:])
            raise RuntimeError(f"ended with {done.returncode}\n{tail}")
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def write(args: argparse.Namespace, shape: Shape, ready: list[Variant], figures: Figures, limits: Limits) -> None:
    made = lines(figures, ready, args.rows, lambda metric, precision: limit(metric, shape, precision, limits))
    chosen = {
        name: getattr(args, name) for name in ("rows", "engines", "precisions", "repetitions", "quick", "threads")
    }
    report = {
        "benchmark": "cpu",
        "command": "make bench-cpu",
        "arguments": chosen | {"model": shape.name, "guard": not args.no_guard},
        "machine": machine(),
        "versions": dict(sorted(figures.versions.items())),
        "seed": SEED,
        "limits": {
            "read_bytes_per_s": {str(size): rate for size, rate in sorted(limits.read.items())},
            "operations_per_s": limits.peak,
        },
        "lines": [asdict(line) for line in made],
        "samples": figures.samples,
        "others": figures.others,
        "seconds": figures.seconds,
        "failed": sorted(figures.failures),
    }
    out = args.out or REPOSITORY / "benchmarks" / "results" / f"cpu-{shape.name}.json"
    out.write_text(json.dumps(report, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-cpu", description=(__doc__ or "").splitlines()[0])
    known = "; ".join(f"{letter}: {title}" for letter, title in rows.ROWS.items())
    parser.add_argument("--rows", default="".join(rows.ROWS), help=known)
    parser.add_argument("--engines", type=listed(engines.ENGINES), help=", ".join(engines.ENGINES))
    parser.add_argument("--precisions", type=listed(engines.PRECISIONS), default=list(engines.PRECISIONS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--model", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--quick", action="store_true", help="without vllm-eager; row d at 2,048 with up to 8 requests")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeat-slow", action="store_true", help="measure slow peers in every round, too")
    parser.add_argument("--no-guard", action="store_true", help="do not wait for a quiet machine (for development)")
    parser.add_argument("--prepare", action="store_true", help="install peers and make models, and stop there")
    parser.add_argument("--llama-build", help="a build of llama.cpp that exists (also $LLAMA_CPP_BUILD)")
    parser.add_argument("--llama-sources", help="its sources (also $LLAMA_CPP_SOURCES)")
    parser.add_argument("--out", type=Path, help="where to write the JSON; default: benchmarks/results/cpu-MODEL.json")
    args = parser.parse_args()
    if set(args.rows) - set(rows.ROWS):
        parser.error(f"--rows takes letters of {''.join(rows.ROWS)}")
    if args.engines is None:
        args.engines = list(engines.QUICK_ENGINES if args.quick else engines.DEFAULT_ENGINES)
    return args


def listed(known: tuple[str, ...]) -> Any:
    """An argument type: words of `known`, with commas between them."""

    def parse(text: str) -> list[str]:
        words = text.split(",")
        if unknown := set(words) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not one of {', '.join(known)}")
        return words

    return parse


if __name__ == "__main__":
    raise SystemExit(main())
