"""Where the time of a decode step goes on a CPU: scheduling, inputs, each part of the model, head, sampling, update.

    python -m benchmarks.cpu_step_profile                                # Qwen3-0.6B's shape, bfloat16, batch 32
    python -m benchmarks.cpu_step_profile --quantization int8 --operators
    python -m benchmarks.cpu_step_profile --set attention_backend=reference --batch 8 --context 2048

Three measurements in one process, on requests that all decode: (1) nothing but a clock around each step; (2) with
stopwatches around the step's ten or so stages, which says what the engine costs outside the model; (3) with a stopwatch
around every call inside the model too, which slows it a little and says how its time divides. With --operators, (4):
torch's profiler, by operator. A part's time is its own: what it spends in parts listed below it is counted there.
Times are medians over steps. The limit this project sets itself is 2 ms outside the model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from benchmarks.cpu.shapes import QWEN3_06B

from powerband.core.clock import MonotonicClock
from powerband.core.loop import Add, Command
from powerband.core.params import SamplingParams
from powerband.core.request import EngineRequest
from powerband.engine.build import Engine, build_engine
from powerband.spec.settings import EngineSettings

LIMIT_MS = 2.0
# What happens outside `model` and `head` is the engine's overhead; sampling is told apart.
MODEL_STAGES = ("model", "head")
SAMPLING_STAGES = ("sample", "wait for tokens")


class Stopwatch:
    """Seconds and calls of named parts, each without the parts inside it. Everything runs in one thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._inside: list[float] = [0.0]  # seconds that the open parts have spent in parts of their own
        self._undo: list[Callable[[], None]] = []

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - start
                self.seconds[name] += elapsed - self._inside.pop()
                self._inside[-1] += elapsed
                self.calls[name] += 1

        return timed

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Time owner.method from now until `remove`. Objects with slots are watched through their class."""
        holder = owner if hasattr(owner, "__dict__") else type(owner)
        own = vars(holder).get(method)
        setattr(holder, method, self.around(name, getattr(holder, method)))
        restore = (lambda: setattr(holder, method, own)) if own is not None else (lambda: delattr(holder, method))
        self._undo.append(restore)

    def clear(self) -> None:
        self.seconds.clear()
        self.calls.clear()

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()


class Inbox:
    """Requests that are all due at once."""

    def __init__(self) -> None:
        self.commands: list[Command] = []

    def poll(self, _now: float) -> list[Command]:
        taken, self.commands = self.commands, []
        return taken

    def next_time(self) -> float | None:
        return None

    def wait(self, _until: float | None) -> None:
        raise RuntimeError("the engine has nothing to do")


class Decoding:
    """An engine with `batch` requests that all decode."""

    def __init__(self, settings: EngineSettings, batch: int, context: int, params: dict[str, Any]) -> None:
        self.inbox, self.batch = Inbox(), batch
        self.engine: Engine = build_engine(settings, inbox=self.inbox, clock=MonotonicClock())
        sampling = SamplingParams(max_tokens=None, ignore_eos=True, **params)
        vocab = self.engine.spec.vocab_size
        prompts = torch.randint(0, vocab, (batch, context), generator=torch.Generator().manual_seed(0)).tolist()
        self.inbox.commands = [
            Add(EngineRequest(id=str(i), token_ids=prompt, params=sampling, arrival_s=0.0))
            for i, prompt in enumerate(prompts)
        ]
        started: set[str] = set()
        while len(started) < batch:
            started |= {output.id for output in self.step()}

    def step(self) -> list[Any]:
        outputs = self.engine.core.step()
        for output in outputs:
            if output.error is not None:
                raise RuntimeError(output.error.message)
        return outputs

    def steps(self, count: int, watch: Stopwatch) -> tuple[list[float], list[dict[str, float]]]:
        """Seconds of each of `count` decode steps, and of each part of it."""
        for _ in range(3):
            self.step()
        whole, parts = [], []
        for _ in range(count):
            watch.clear()
            start = time.perf_counter()
            outputs = self.step()
            whole.append(time.perf_counter() - start)
            parts.append(dict(watch.seconds))
            assert len(outputs) == self.batch, "every request decodes in every step"
        return whole, parts


@contextmanager
def stages(engine: Engine) -> Iterator[Stopwatch]:
    """Stopwatches around what a step consists of, outside in."""
    watch = Stopwatch()
    runner = engine.executor.runner
    watch.watch(engine.core, "step", "loop")
    watch.watch(engine.scheduler, "schedule", "schedule")
    watch.watch(engine.scheduler, "update", "update")
    watch.watch(engine.core, "_observe", "observe")
    watch.watch(runner, "launch", "launch")
    watch.watch(runner._inputs, "build", "inputs")
    watch.watch(runner, "_fill_pending", "inputs")
    watch.watch(runner, "forward", "model")
    watch.watch(runner.model, "logits", "head")
    watch.watch(runner.model, "argmax", "head")
    watch.watch(runner, "_sample", "sample")
    pending_step = sys.modules[type(runner).__module__].PendingStep
    watch.watch(pending_step, "result", "wait for tokens")
    try:
        yield watch
    finally:
        watch.remove()


@contextmanager
def inside_model(engine: Engine, watch: Stopwatch) -> Iterator[None]:
    """Stopwatches around every module of the model, by its name in the layer, and around attention."""
    model = engine.executor.runner.model
    for path, module in model.named_modules():
        name = "layer" if path.rpartition(".")[2].isdigit() else path.rpartition(".")[2]
        if not name or "ModuleList" in type(module).__name__:
            continue
        shown = name if path.count(".") else f"model.{name}"
        if name == "attention":  # the module: what is around its projections and the backend
            shown = "attention module"
        for method in public_methods(module):
            watch.watch(module, method, shown)
        if callable(getattr(module, "gated", None)):
            watch.watch(module, "gated", "activation")
    if model.run_layers is not None:
        watch.watch(model, "run_layers", "all layers")
    for table in model.rotary.values():
        watch.watch(table, "at", "rotary table")
    backend = engine.executor.attention
    names = {"begin": "attention plan", "attend_unrotated": "norm + rotary"}
    for method in public_methods(backend):
        watch.watch(backend, method, names.get(method, "attention"))
    try:
        yield
    finally:
        watch.remove()


def public_methods(owner: Any) -> list[str]:
    """What of `owner` the engine may call in a step, as far as it is defined in this project."""
    classes = [kind for kind in type(owner).__mro__ if kind.__module__.startswith("powerband.")]
    names = {name for kind in classes for name, value in vars(kind).items() if isinstance(value, FunctionType)}
    return sorted(name for name in names if not name.startswith("_"))


def medians(parts: list[dict[str, float]]) -> dict[str, float]:
    """Milliseconds by part, the largest first."""
    names = {name for part in parts for name in part}
    found = {name: 1000 * statistics.median(part.get(name, 0.0) for part in parts) for name in names}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def show(title: str, values: dict[str, float], calls: dict[str, int] | None = None) -> None:
    total = sum(values.values()) or 1.0
    print(f"\n{title:<28}{'ms':>9}{'share':>8}{'calls':>8}")
    for name, milliseconds in values.items():
        count = f"{calls[name]:>8}" if calls else ""
        print(f"  {name:<26}{milliseconds:>9.3f}{milliseconds / total:>8.1%}{count}")
    print(f"  {'together':<26}{total:>9.3f}")


def operators(decoding: Decoding, count: int) -> dict[str, float]:
    """Milliseconds a step that each torch operator takes itself, by torch's profiler, which costs time of its own."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(count):
            decoding.step()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)[:25]
    print(f"\n{'operator, by the profiler':<48}{'ms a step':>10}{'calls':>8}{'µs each':>9}")
    for event in events:
        milliseconds, calls = event.self_cpu_time_total / 1000 / count, event.count / count
        print(f"  {event.key[:46]:<46}{milliseconds:>10.3f}{calls:>8.0f}{1000 * milliseconds / calls:>9.1f}")
    return {event.key: event.self_cpu_time_total / 1000 / count for event in events}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model is None:
            model = folder
            Path(folder, "config.json").write_text(json.dumps(QWEN3_06B.config))
        decoding = Decoding(_settings(args, model), args.batch, args.context, json.loads(args.sampling))
    engine = decoding.engine
    if args.apart:
        engine.executor.runner.model.run_layers = None
    print(engine.info.summary)
    print(f"batch {args.batch}, context {args.context}, {args.threads} threads, medians of {args.steps} steps")
    bare, _ = decoding.steps(args.steps, Stopwatch())
    with stages(engine) as watch:
        staged, parts = decoding.steps(args.steps, watch)
        stage_ms, stage_calls = medians(parts), dict(watch.calls)
    with stages(engine) as watch, inside_model(engine, watch):
        detailed, parts = decoding.steps(args.steps, watch)
        part_ms, part_calls = medians(parts), dict(watch.calls)
    step_ms = [1000 * statistics.median(seconds) for seconds in (bare, staged, detailed)]
    print(f"a step: {step_ms[0]:.2f} ms; with stages watched {step_ms[1]:.2f}; with all watched {step_ms[2]:.2f}")
    show("stages", stage_ms, stage_calls)
    show("stages and parts of the model", part_ms, part_calls)
    result = {"step_ms": step_ms[0], "stages_ms": stage_ms, "parts_ms": part_ms}
    if args.operators:
        result["operators_ms"] = operators(decoding, min(args.steps, 10))
    overhead = sum(v for name, v in stage_ms.items() if name not in MODEL_STAGES + SAMPLING_STAGES)
    sampling = sum(stage_ms.get(name, 0.0) for name in SAMPLING_STAGES)
    print(f"\noutside the model: {overhead:.2f} ms (limit {LIMIT_MS:.0f}) and {sampling:.2f} ms of sampling")
    engine.close()
    return result | {"overhead_ms": overhead, "sampling_ms": sampling}


def _settings(args: argparse.Namespace, model: str) -> EngineSettings:
    options: dict[str, Any] = {
        "model": model,
        "load_format": "auto" if args.model else "dummy",
        "dtype": "bfloat16",
        "device": "cpu",
        "threads": args.threads,
        "max_model_len": args.context + 4 * (args.steps + 8),
        "max_num_seqs": args.batch,
        "enable_prefix_caching": False,
        "async_scheduling": False,  # one thread: a part's time is its own
    }
    if args.quantization:
        options["quantization"] = args.quantization
    for text in args.set:
        name, _, value = text.partition("=")
        options[name] = json.loads(value) if value[:1] in '0123456789"tfn' else value
    return EngineSettings(**options)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a checkpoint's folder; default: Qwen3-0.6B's shape, random weights")
    parser.add_argument("--quantization", choices=("int8", "int4"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sampling", default='{"temperature": 0}', help="fields of SamplingParams, as JSON")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any other engine setting")
    parser.add_argument("--apart", action="store_true", help="run the layers part by part, to see inside them")
    parser.add_argument("--operators", action="store_true", help="also: torch's profiler, by operator")
    parser.add_argument("--out", type=Path, help="also write the figures to this file, as JSON")
    args = parser.parse_args()
    result = measure(args)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["overhead_ms"] <= LIMIT_MS else 1


if __name__ == "__main__":
    raise SystemExit(main())
