"""Decoding with LoRA adapters beside decoding without: one engine, the same prompts, in turns.

    python benchmarks/lora.py                       # the shape of Qwen3-0.6B, 8 adapters of rank 16 in a batch of 32
    python benchmarks/lora.py --model demo --rank 8
    python benchmarks/lora.py --quantization int8

Every request of a batch has one of the adapters, in turn; they change all projections of attention and MLP. Per token:
the time of a step in which all requests decode, median over the steps of all turns; CPU time beside it, which other
processes on the machine disturb less. `over`: what adapters add, as a share. A turn of each side that is not counted
goes first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from generate import QWEN3_06B, Inbox, machine_busy_s
from safetensors.torch import save_file

from powerband.core.clock import MonotonicClock
from powerband.core.loop import Add
from powerband.core.params import SamplingParams
from powerband.core.request import EngineRequest
from powerband.engine.build import Engine, build_engine
from powerband.engine.lora.targets import adapter_targets
from powerband.engine.model_loader.checkpoint import resolve_model
from powerband.spec.model.reader import read_model_spec
from powerband.spec.settings import EngineSettings

GOAL = 0.15  # adapters may add so much to a step


@dataclass(frozen=True, slots=True)
class Result:
    side: str
    step_ms: float
    spread: float  # (90th - 10th percentile) / median
    cpu_ms: float
    others: float  # share of the machine's CPU time that other processes took


def write_adapter(model: Path, folder: Path, rank: int, seed: int) -> None:
    """Random A and B for every projection, small enough not to change what a model says into noise."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors, names = {}, set()
    for name, target in adapter_targets(read_model_spec(model)).items():
        names.add(name.rpartition(".")[2])
        for part, shape in (("A", (rank, target.in_features)), ("B", (target.out_features, rank))):
            values = torch.randn(shape, generator=generator) * 0.01
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = values.bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(names)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def steps(engine: Engine, inbox: Inbox, adapters: list[str], args: argparse.Namespace) -> list[tuple[float, float]]:
    """(elapsed, CPU) seconds of each step in which every request decodes."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, engine.spec.vocab_size, (args.batch, args.prompt), generator=generator).tolist()
    params = SamplingParams(max_tokens=args.output, temperature=0.0, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        adapter = adapters[index % len(adapters)] if adapters else ""
        request = EngineRequest(id=str(index), token_ids=prompt, params=params, arrival_s=0.0, adapter=adapter)
        inbox.commands.append(Add(request))
    measured = []
    while inbox.commands or engine.core.busy:
        start, start_cpu = time.perf_counter(), time.process_time()
        outputs = engine.core.step()
        seconds = time.perf_counter() - start, time.process_time() - start_cpu
        failed = next((output.error for output in outputs if output.error is not None), None)
        if failed is not None:
            raise RuntimeError(failed.message)
        if len(outputs) == args.batch:
            measured.append(seconds)
    return measured[1:]  # the first had prompts in it


def compare(engine: Engine, inbox: Inbox, args: argparse.Namespace) -> list[Result]:
    sides = {"none": [], "adapters": [info.digest for info in engine.adapters.infos()]}
    taken: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    others: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(args.repetitions + 1):
        for side, adapters in sides.items():
            busy, own, start = machine_busy_s(), time.process_time(), time.perf_counter()
            measured = steps(engine, inbox, adapters, args)
            elapsed = time.perf_counter() - start
            if turn:
                taken[side] += measured
                others_s = max(machine_busy_s() - busy - (time.process_time() - own), 0.0)
                others[side].append(others_s / elapsed / (os.cpu_count() or 1))
    return [result(side, taken[side], statistics.median(others[side])) for side in sides]


def result(side: str, measured: list[tuple[float, float]], others: float) -> Result:
    elapsed = sorted(seconds for seconds, _ in measured)
    median = statistics.median(elapsed)
    low, high = elapsed[len(elapsed) // 10], elapsed[len(elapsed) * 9 // 10]
    cpu = statistics.median(seconds for _, seconds in measured)
    return Result(side, 1000 * median, (high - low) / median, 1000 * cpu, others)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="qwen3-0.6b", help="'qwen3-0.6b' for its shape, a folder, or 'demo'")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--output", type=int, default=24)
    parser.add_argument("--repetitions", type=int, default=4)
    parser.add_argument("--quantization", default="none", choices=("none", "int8", "int4"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, is_shape = Path(folder), args.model == "qwen3-0.6b"
        if is_shape:
            (model / "config.json").write_text(json.dumps({"model_type": "qwen3", **QWEN3_06B}))
        else:
            model = resolve_model(EngineSettings(model=args.model))
        named = [f"a{index}={folder}/a{index}" for index in range(args.adapters)]
        for index in range(args.adapters):
            write_adapter(model, Path(folder) / f"a{index}", args.rank, index)
        settings = EngineSettings(
            model=str(model),
            load_format="dummy" if is_shape else "auto",
            dtype="bfloat16",
            device="cpu",
            quantization=args.quantization,
            threads=args.threads,
            max_model_len=args.prompt + args.output,
            max_num_seqs=args.batch,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
            kv_cache_memory="512MiB",
            weight_cache="off",
            lora=tuple(named),
            max_lora_rank=args.rank,
        )
        inbox = Inbox()
        engine = build_engine(settings, inbox=inbox, clock=MonotonicClock())
        results = compare(engine, inbox, args)
        engine.close()
    none, adapters = results
    over, cpu_over = adapters.step_ms / none.step_ms - 1, adapters.cpu_ms / none.cpu_ms - 1
    for one in results:
        print(
            f"{one.side:<9} {one.step_ms:7.2f} ms a step (spread {one.spread:.0%}), CPU {one.cpu_ms:7.2f} ms, "
            f"others {one.others:.0%}"
        )
    print(f"over      {over:.1%}, CPU {cpu_over:.1%}; goal {GOAL:.0%}")
    if args.json:
        settings_shown = {name: value for name, value in vars(args).items() if name != "json"}
        report = {"settings": settings_shown, "results": list(map(asdict, results)), "over": over, "cpu_over": cpu_over}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if over <= GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
