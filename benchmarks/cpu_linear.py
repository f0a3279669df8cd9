"""Products with packed weights on this CPU: our kernels beside torch's own operators, by precision, shape and rows.

    python benchmarks/cpu_linear.py                                  # all precisions, 2 threads
    python benchmarks/cpu_linear.py --precision bf16 --shapes 1024x6144 --rows 1,8,64

Both are called in turn, each time with other weights: copies of more than --rotate-mb, so that they come from memory as
they do in a model. GB/s counts the weights; "of read" compares with a plain sum over the same bytes, in the same turns.
"ratio" is torch's time over ours by the medians: above 1 we are faster.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from powerband.engine.kernels.cpu import library
from powerband.engine.linear.bf16 import Bf16Provider
from powerband.engine.linear.quantized import QuantizedProvider
from powerband.engine.linear.quantized_weights import quantize_int4, quantize_int8
from powerband.spec.checkpoint.quantization import DEFAULT_GROUP
from powerband.spec.hardware.device import detect_cpu

SHAPES = "1024x4096,2048x1024,1024x6144,3072x1024,1024x151936"  # inputs x outputs: Qwen3-0.6B's projections and head
ROWS = "1,4,8,16,32,64,128,512"

Product = Callable[[torch.Tensor], object]


@dataclass(frozen=True, slots=True)
class Precision:
    """Two ways to make a product from a bf16 weight [out, in]; bytes that a product reads for each of its elements."""

    bytes_per_weight: float
    ours: Callable[[torch.Tensor], Product]
    torchs: Callable[[torch.Tensor], Product]


def kernel_bf16(weight: torch.Tensor) -> Product:
    product = Bf16Provider().prepare(weight, None)
    assert product is not None
    return product


def onednn_bf16(weight: torch.Tensor) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def kernel_int8(weight: torch.Tensor) -> Product:
    return QuantizedProvider("int8", kernels=True).prepare(weight, None)


def torch_int8(weight: torch.Tensor) -> Product:
    held = quantize_int8(weight)
    scales = held.scales.bfloat16()
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, held.values, scales)


def kernel_int4(weight: torch.Tensor) -> Product:
    return QuantizedProvider("int4", kernels=True).prepare(weight, None)


def torch_int4(weight: torch.Tensor) -> Product:
    held = quantize_int4(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(held.values.int(), 1)
    scales = torch.stack([held.scales.t(), torch.zeros_like(held.scales.t())], dim=2).bfloat16().contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, held.group_size, scales)


PRECISIONS = {
    "bf16": Precision(2, kernel_bf16, onednn_bf16),
    "int8": Precision(1, kernel_int8, torch_int8),
    "int4": Precision(0.5 + 4 / DEFAULT_GROUP, kernel_int4, torch_int4),
}


@dataclass(frozen=True, slots=True)
class Cell:
    precision: str
    shape: str
    rows: int
    ours_us: list[float]
    torchs_us: list[float]
    read_us: list[float]
    weight_bytes: float
    flops: float

    def line(self) -> str:
        ours, torchs = statistics.median(self.ours_us), statistics.median(self.torchs_us)
        of_read = statistics.median(self.read_us) / ours
        return (
            f"{self.precision:6}{self.shape:>12}{self.rows:6}{ours:11.1f}{min(self.ours_us):10.1f}"
            f"{self.weight_bytes / ours / 1e3:8.1f}{of_read:8.0%}{self.flops / ours / 1e3:9.0f}"
            f"{torchs:11.1f}{min(self.torchs_us):10.1f}{torchs / ours:8.2f}"
        )

    @staticmethod
    def header() -> str:
        return (
            f"{'':6}{'in x out':>12}{'rows':>6}{'us median':>11}{'min':>10}{'GB/s':>8}{'of read':>8}{'GFLOP/s':>9}"
            f"{'torch us':>11}{'min':>10}{'ratio':>8}"
        )


def microseconds(call: Callable[[], object]) -> float:
    """Of this thread's own time, where it does everything: a busy machine matters less."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return 1e6 * (clock() - start)


def measure(name: str, shape: str, rows: list[int], rotate_bytes: float, seconds: float) -> Iterator[Cell]:
    precision = PRECISIONS[name]
    inputs, outputs = map(int, shape.split("x"))
    weight = torch.randn(outputs, inputs, dtype=torch.float32).mul_(0.02).bfloat16()
    weight_bytes = weight.numel() * precision.bytes_per_weight
    copies = max(1, round(rotate_bytes / weight_bytes))
    ours = itertools.cycle([precision.ours(weight) for _ in range(copies)])
    torchs = itertools.cycle([precision.torchs(weight) for _ in range(copies)])
    plain = torch.zeros(copies, round(weight_bytes / 4))
    reads = itertools.cycle(range(copies))
    for count in rows:
        x = torch.randn(count, inputs).bfloat16()
        turns: list[tuple[float, float, float]] = []
        next(ours)(x), next(torchs)(x)
        until = time.perf_counter() + seconds
        while len(turns) < 3 or time.perf_counter() < until:
            mine, theirs, read = next(ours), next(torchs), plain[next(reads)]
            turns.append(
                (
                    microseconds(lambda call=mine, x=x: call(x)),
                    microseconds(lambda call=theirs, x=x: call(x)),
                    microseconds(read.sum),
                )
            )
        columns = [list(column) for column in zip(*turns, strict=True)]
        yield Cell(name, shape, count, *columns, weight_bytes, 2.0 * count * inputs * outputs)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--precision", default=",".join(PRECISIONS))
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rotate-mb", type=float, default=600)
    parser.add_argument("--seconds", type=float, default=0.4, help="for each line of the table")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = [int(count) for count in args.rows.split(",")]
    print(f"{detect_cpu().name}, {args.threads} threads; kernels: {library.load().reason}\n{Cell.header()}", flush=True)
    cells = []
    for name, shape in itertools.product(args.precision.split(","), args.shapes.split(",")):
        for cell in measure(name, shape, rows, args.rotate_mb * 1e6, args.seconds):
            print(cell.line(), flush=True)
            cells.append(cell)
    if args.output:
        args.output.write_text(json.dumps(report(args, cells), indent=2) + "\n")
    return 0


def report(args: argparse.Namespace, cells: list[Cell]) -> dict[str, object]:
    return {
        "benchmark": "cpu_linear",
        "seed": 0,
        "machine": {"processor": detect_cpu().name, "system": platform.platform(), "kernels": library.load().reason},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "arguments": {name: str(value) for name, value in vars(args).items() if name != "output"},
        "cells": [
            {
                "precision": cell.precision,
                "shape": cell.shape,
                "rows": cell.rows,
                "ours_us": {"median": statistics.median(cell.ours_us), "min": min(cell.ours_us)},
                "torch_us": {"median": statistics.median(cell.torchs_us), "min": min(cell.torchs_us)},
                "read_us": {"median": statistics.median(cell.read_us), "min": min(cell.read_us)},
            }
            for cell in cells
        ],
    }


if __name__ == "__main__":
    raise SystemExit(main())
