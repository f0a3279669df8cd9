"""Attention on this CPU, decodes and prefill chunks: our kernels beside the reference backend and torch's own operator.

Ours twice: over a KV cache in bfloat16, and over one in int8.

    python benchmarks/cpu_attention.py                               # 2 threads, under a minute
    python benchmarks/cpu_attention.py --works 32x1@2048 --threads 1

A work is requests x new tokens @ context: 32x1@2048 are 32 decodes, 1x2048@2048 a prompt. All are called in turn, each
time for another layer, so that keys and values come from memory as they do in a model. Ours and the reference write the
new keys and values and read paged ones; `F.scaled_dot_product_attention` (enable_gqa) gets all of them side by side as
it likes them best. GB/s counts keys and values (those in int8 with their scales), each once; "of read" compares with a
plain sum over as many bytes; GFLOP/s counts only what causality leaves. Ratios are the other's time over ours by the
medians, above 1 we are faster; that of int8 is what it gains over bfloat16.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from powerband.engine.attention.base import AttentionBackend, AttentionBatch, AttentionShape
from powerband.engine.attention.cpu import BLOCK_SIZE, CpuAttention
from powerband.engine.attention.reference import ReferenceAttention
from powerband.engine.kernels.cpu import library
from powerband.spec.hardware.device import detect_cpu

WORKS = "1x1@2048,8x1@512,32x1@512,32x1@2048,1x4@2048,1x512@512,1x2048@2048,1x512@2048,8x256@256"


@dataclass(frozen=True, slots=True)
class Work:
    requests: int
    new: int
    context: int

    @classmethod
    def parse(cls, text: str) -> Work:
        requests, rest = text.split("x")
        new, context = rest.split("@")
        return cls(int(requests), int(new), int(context))

    def batch(self) -> AttentionBatch:
        """Every request in blocks that lie anywhere."""
        width = -(-self.context // BLOCK_SIZE)
        tables = torch.randperm(self.requests * width).view(self.requests, width)
        positions = torch.arange(self.context - self.new, self.context)
        slots = tables[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        starts = torch.arange(self.requests + 1) * self.new
        contexts = torch.full((self.requests,), self.context)
        decodes = self.requests if self.new == 1 else 0
        numbers = (starts.int(), contexts.int(), tables.int(), slots.flatten())
        return AttentionBatch(*numbers, decodes, starts.tolist(), contexts.tolist())

    def kv_bytes(self, shape: AttentionShape) -> float:
        return 4.0 * self.requests * self.context * shape.num_kv_heads * shape.head_dim

    def int8_bytes(self, shape: AttentionShape) -> float:
        return self.kv_bytes(shape) * (shape.head_dim + 4) / (2 * shape.head_dim)

    def flops(self, shape: AttentionShape) -> float:
        seen = self.new * (self.context - self.new) + self.new * (self.new + 1) / 2
        return 4.0 * self.requests * seen * shape.num_heads * shape.head_dim


@dataclass(frozen=True, slots=True)
class Cell:
    """Microseconds of every turn."""

    work: str
    kv_bytes: float
    int8_bytes: float
    flops: float
    ours: list[float]
    int8: list[float]
    reference: list[float]
    sdpa: list[float]
    read: list[float]

    def line(self) -> str:
        columns = (self.ours, self.int8, self.reference, self.sdpa, self.read)
        ours, int8, reference, sdpa, read = map(statistics.median, columns)
        return (
            f"{self.work:>14}{ours:11.0f}{min(self.ours):10.0f}{self.kv_bytes / ours / 1e3:8.1f}{read / ours:8.0%}"
            f"{self.flops / ours / 1e3:9.0f}{int8:11.0f}{self.int8_bytes / int8 / 1e3:8.1f}{ours / int8:7.2f}"
            f"{reference:13.0f}{reference / ours:7.1f}{sdpa:11.0f}{sdpa / ours:7.1f}"
        )


HEADER = (
    f"{'work':>14}{'us median':>11}{'min':>10}{'GB/s':>8}{'of read':>8}{'GFLOP/s':>9}"
    f"{'int8 us':>11}{'GB/s':>8}{'ratio':>7}{'reference us':>13}{'ratio':>7}{'SDPA us':>11}{'ratio':>7}"
)


def measure(text: str, shape: AttentionShape, rotate_bytes: float, seconds: float) -> Cell:
    work = Work.parse(text)
    batch, layers = work.batch(), max(1, round(rotate_bytes / work.kv_bytes(shape)))
    ours, int8 = CpuAttention(), CpuAttention()
    reference = ReferenceAttention(BLOCK_SIZE, torch.device("cpu"))
    for backend, held in ((ours, torch.bfloat16), (int8, torch.int8), (reference, torch.bfloat16)):
        backend.allocate(layers, batch.block_tables.numel(), shape, held)
    for layer in range(layers):
        fill(ours.cache[layer])
        fill_int8(int8.cache[layer], shape.head_dim)
        for part in reference.cache[layer]:
            fill(part)
    size = (layers, 2, work.requests, shape.num_kv_heads, work.context, shape.head_dim)
    together = torch.empty(size, dtype=torch.bfloat16)
    fill(together)
    heads = shape.num_heads + 2 * shape.num_kv_heads
    qkv = torch.randn(work.requests * work.new, heads, shape.head_dim).bfloat16()
    plain = together.view(layers, -1).view(torch.float32)

    def paged(backend: AttentionBackend, layer: int) -> Callable[[], object]:
        return lambda: backend.attend_unrotated(layer, qkv, None, None, batch, shape)

    rounds: list[list[float]] = []
    until = time.perf_counter() + seconds
    while len(rounds) < 4 or time.perf_counter() < until:
        layer = len(rounds) % layers
        calls = (
            paged(ours, layer),
            paged(int8, layer),
            paged(reference, layer),
            lambda layer=layer: sdpa(qkv, together[layer], work, shape),
            plain[layer].sum,
        )
        rounds.append([microseconds(call) for call in calls])
    columns = [list(column) for column in zip(*rounds[1:], strict=True)]  # the first turn warms up
    return Cell(text, work.kv_bytes(shape), work.int8_bytes(shape), work.flops(shape), *columns)


def fill(memory: torch.Tensor) -> None:
    """Random numbers, the same ones again and again: to draw so many would take longer than the benchmark."""
    flat = memory.view(-1)
    numbers = torch.randn(1 << 16).bfloat16()
    for start in range(0, len(flat), len(numbers)):
        part = flat[start : start + len(numbers)]
        part.copy_(numbers[: len(part)])


def fill_int8(memory: torch.Tensor, head_dim: int) -> None:
    """Any numbers, all times the same scale."""
    memory.copy_(torch.randint(-127, 128, memory.shape[1:], dtype=torch.int8))
    memory[..., 2 * BLOCK_SIZE * head_dim :].view(torch.float32).fill_(0.02)


def sdpa(qkv: torch.Tensor, kv: torch.Tensor, work: Work, shape: AttentionShape) -> torch.Tensor:
    q = qkv[:, : shape.num_heads].unflatten(0, (work.requests, work.new)).transpose(1, 2)
    mask = None
    if 1 < work.new < work.context:
        mask = torch.ones(work.new, work.context, dtype=torch.bool).tril_(work.context - work.new)
    causal = work.new == work.context and work.new > 1
    return F.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=mask, is_causal=causal, enable_gqa=True)


def microseconds(call: Callable[[], object]) -> float:
    """Of this thread's own time, where it does everything: a busy machine matters less."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return 1e6 * (clock() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--works", default=WORKS, help="requests x new tokens @ context, comma between")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rotate-mb", type=float, default=300)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each line of the table")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape = AttentionShape(args.heads, args.kv_heads, args.head_dim, args.head_dim**-0.5)
    kernels = library.load()
    if kernels.tier is None:
        parser.error(f"no CPU kernels: {kernels.reason}")
    print(f"{detect_cpu().name}, {args.threads} threads; kernels: {kernels.reason}\n{HEADER}", flush=True)
    cells = []
    for text in args.works.split(","):
        cells.append(measure(text, shape, args.rotate_mb * 1e6, args.seconds))
        print(cells[-1].line(), flush=True)
    if args.output:
        machine = {"processor": detect_cpu().name, "system": platform.platform(), "kernels": kernels.reason}
        report = {
            "benchmark": "cpu_attention",
            "seed": 0,
            "machine": machine,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "arguments": {name: str(value) for name, value in vars(args).items() if name != "output"},
            "unit": "microseconds",
            "cells": [asdict(cell) for cell in cells],
        }
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
