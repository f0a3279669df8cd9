"""Generating with Powerband beside transformers.generate: same machine, same weights, same prompts, taken in turns.

    python benchmarks/generate.py                      # the shape of Qwen3-0.6B with random weights, bfloat16
    python benchmarks/generate.py --model demo --dtype float32

Both run greedily and without end-of-text, in this process, with the same threads. First token: from the prompts'
arrival to the first token of all of them. Per token: the time of the remaining tokens over their number. Medians over
the repetitions; the spread is (largest - smallest) / median. `others`: share of the machine's CPU time that other
processes took, which makes figures doubtful above a few per cent; CPU time, with --threads 1, suffers less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from powerband.core.clock import MonotonicClock
from powerband.core.loop import Add, Command
from powerband.core.params import SamplingParams
from powerband.core.request import EngineRequest
from powerband.engine.build import Engine, build_engine
from powerband.engine.model_loader.checkpoint import resolve_model
from powerband.spec.hardware.device import detect_cpu
from powerband.spec.settings import EngineSettings

GOAL = 1.2  # times as fast as transformers, in every row
QWEN3_06B = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, slots=True)
class Timing:
    first_token_s: float
    per_token_s: float
    cpu_per_token_s: float  # of all threads of this process


@dataclass(frozen=True, slots=True)
class Result:
    side: str
    batch: int
    first_token_ms: float
    first_token_spread: float
    per_token_ms: float
    per_token_spread: float
    cpu_per_token_ms: float
    output_tokens_per_s: float
    others: float


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


class Ours:
    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.inbox = Inbox()
        length = args.prompt + args.output
        settings = EngineSettings(
            model=str(folder),
            dtype=args.dtype,
            device="cpu",
            threads=args.threads,
            max_model_len=length,
            max_num_seqs=max(args.batch),
            max_num_batched_tokens=max(2048, max(args.batch)),
            enable_prefix_caching=False,
        )
        start = time.perf_counter()
        self.engine: Engine = build_engine(settings, inbox=self.inbox, clock=MonotonicClock())
        self.start_s = time.perf_counter() - start

    def __call__(self, prompts: list[list[int]], output: int) -> Timing:
        params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        self.inbox.commands = [
            Add(EngineRequest(id=str(index), token_ids=prompt, params=params, arrival_s=0.0))
            for index, prompt in enumerate(prompts)
        ]
        waiting = {str(index) for index in range(len(prompts))}
        first = first_cpu = start
        while self.inbox.commands or self.engine.core.busy:
            for told in self.engine.core.step():
                if told.error is not None:
                    raise RuntimeError(told.error.message)
                if told.id in waiting:
                    waiting.discard(told.id)
                    first, first_cpu = time.perf_counter(), time.process_time()
        rest, rest_cpu = time.perf_counter() - first, time.process_time() - first_cpu
        return Timing(first - start, rest / (output - 1), rest_cpu / (output - 1))


class Theirs:
    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        import transformers

        start = time.perf_counter()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype))
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self.start_s = time.perf_counter() - start

    def __call__(self, prompts: list[list[int]], output: int) -> Timing:
        first, first_cpu = self._seconds(prompts, 1)
        whole, whole_cpu = self._seconds(prompts, output)
        return Timing(first, (whole - first) / (output - 1), (whole_cpu - first_cpu) / (output - 1))

    @torch.inference_mode()
    def _seconds(self, prompts: list[list[int]], output: int) -> tuple[float, float]:
        """(elapsed, CPU)"""
        ids = torch.tensor(prompts)
        start, start_cpu = time.perf_counter(), time.process_time()
        made = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=output, min_new_tokens=output, do_sample=False
        )
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
        assert made.shape[1] == ids.shape[1] + output
        return seconds, cpu_seconds


def compare(
    sides: dict[str, Callable[[list[list[int]], int], Timing]], batch: int, args: Any, vocab: int
) -> list[Result]:
    """Both sides in turns, on fresh prompts; the first turn warms up and is not counted."""
    timings: dict[str, list[Timing]] = {side: [] for side in sides}
    others: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(args.repetitions + 1):
        prompts = torch.randint(0, vocab, (batch, args.prompt), generator=torch.Generator().manual_seed(turn)).tolist()
        for side, generate in sides.items():
            busy, own = machine_busy_s(), time.process_time()
            timing = generate(prompts, args.output)
            others_s = machine_busy_s() - busy - (time.process_time() - own)
            if turn:
                timings[side].append(timing)
                elapsed = timing.first_token_s + timing.per_token_s * (args.output - 1)
                others[side].append(max(others_s, 0.0) / elapsed / (os.cpu_count() or 1))
    return [result(side, batch, timings[side], statistics.median(others[side]), args.output) for side in sides]


def result(side: str, batch: int, timings: list[Timing], others: float, output: int) -> Result:
    firsts = [timing.first_token_s for timing in timings]
    pers = [timing.per_token_s for timing in timings]
    first, per = statistics.median(firsts), statistics.median(pers)
    return Result(
        side,
        batch,
        1000 * first,
        (max(firsts) - min(firsts)) / first,
        1000 * per,
        (max(pers) - min(pers)) / per,
        1000 * statistics.median(timing.cpu_per_token_s for timing in timings),
        batch * output / (first + per * (output - 1)),
        others,
    )


def shown(ratios: list[float]) -> str:
    return ", ".join(f"{ratio:.2f}" for ratio in ratios)


def machine_busy_s() -> float:
    """CPU seconds that all processes of this machine have used (Linux; elsewhere 0)."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except (OSError, ValueError):
        return 0.0
    return (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def random_checkpoint(folder: Path, dtype: str) -> Path:
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(**QWEN3_06B)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="qwen3-0.6b", help="folder, 'demo', or 'qwen3-0.6b' for random weights")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the figures to this file, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        if args.model == "qwen3-0.6b":
            folder = random_checkpoint(Path(scratch), args.dtype)
        else:
            folder = resolve_model(EngineSettings(model=args.model))
        ours, theirs = Ours(folder, args), Theirs(folder, args)
        vocab = ours.engine.spec.vocab_size
        sides: dict[str, Callable[[list[list[int]], int], Timing]] = {"powerband": ours, "transformers": theirs}
        results = [row for batch in args.batch for row in compare(sides, batch, args, vocab)]
    print(f"{args.model}, {args.dtype}, {args.threads} threads, prompt {args.prompt}, output {args.output}")
    print(f"start: powerband {ours.start_s:.1f} s, transformers {theirs.start_s:.1f} s (both after importing torch)")
    print(
        f"{'':14}{'batch':>6}{'first token ms':>18}{'per token ms':>18}{'CPU ms':>9}{'output tok/s':>14}{'others':>8}"
    )
    for row in results:
        first = f"{row.first_token_ms:.1f} ±{row.first_token_spread:.0%}"
        per = f"{row.per_token_ms:.2f} ±{row.per_token_spread:.0%}"
        print(
            f"{row.side:14}{row.batch:>6}{first:>18}{per:>18}{row.cpu_per_token_ms:>9.1f}{row.output_tokens_per_s:>14.1f}{row.others:>8.0%}"
        )
    pairs = list(zip(results[::2], results[1::2], strict=True))
    ratios = [theirs_.per_token_ms / ours_.per_token_ms for ours_, theirs_ in pairs]
    cpu_ratios = [theirs_.cpu_per_token_ms / ours_.cpu_per_token_ms for ours_, theirs_ in pairs]
    print(f"batches {args.batch}, per token, times as fast as transformers (goal {GOAL}): {shown(ratios)}")
    print(f"in CPU time: {shown(cpu_ratios)}")
    if args.out:
        about = {
            "machine": {"processor": detect_cpu().name, "system": platform.platform()},
            "versions": {name: version(name) for name in ("powerband", "torch", "transformers")},
            "seed": 0,  # of the prompts and of the random weights
        } | vars(args)
        args.out.write_text(
            json.dumps({"about": about, "results": [asdict(row) for row in results]}, indent=2, default=str) + "\n"
        )
    return 0 if min(ratios) >= GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
