"""The machine's limits, measured in the same run: reading memory, by the size of what is read, and computing."""

from __future__ import annotations

import statistics
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.cpu import rows
from benchmarks.cpu.shapes import Shape

LARGEST = 3 * 10**9  # bytes: beyond every cache, so a larger buffer is read no slower
_SOURCE = Path(__file__).with_name("limits.c")


@dataclass
class Limits:
    """Rates as they were beside the figures that they are compared with: medians over repetitions, then over rounds.

    On a machine that others use too they may be half of what the hardware can do.
    """

    program: Path
    threads: int
    rounds: dict[tuple[str, ...], list[float]] = field(default_factory=dict)  # the program's arguments → its rates
    read: dict[int, float] = field(default_factory=dict)  # bytes → bytes a second
    peak: dict[str, float] = field(default_factory=dict)  # bf16, int8 → operations a second

    @classmethod
    def build(cls, folder: Path, threads: int) -> Limits:
        """Compile limits.c for this processor. Raises CalledProcessError."""
        program = folder / "limits"
        subprocess.run(["cc", "-O3", "-march=native", "-pthread", "-o", str(program), str(_SOURCE)], check=True)
        return cls(program, threads)

    def measure(self, sizes: list[int]) -> None:
        for size in sorted({min(size, LARGEST) for size in sizes}):
            self.read[size] = self._median("read", str(size))
        for kind in ("bf16", "int8"):
            self.peak[kind] = self._median(kind)

    def _median(self, *arguments: str) -> float:
        """Of all rounds, with one more."""
        self.rounds.setdefault(arguments, []).append(self._run(*arguments))
        return statistics.median(self.rounds[arguments])

    def _run(self, *arguments: str) -> float:
        done = subprocess.run([self.program, *arguments, str(self.threads)], capture_output=True, text=True, check=True)
        return float(done.stdout)

    def read_s(self, size: int) -> float:
        return size / self.read[min(size, LARGEST)]

    def prefill_s(self, shape: Shape, precision: str, tokens: int) -> float:
        """Least seconds of a prompt: products at the precision's peak, attention in bfloat16."""
        products = 2.0 * (shape.layer_parameters * tokens + shape.head_parameters)
        attention = shape.prefill_flops(tokens) - products
        kind = "bf16" if precision == "bf16" else "int8"  # int4 weights are multiplied as int8
        return products / self.peak[kind] + attention / self.peak["bf16"]


def sizes(shape: Shape, precision: str) -> list[int]:
    """Bytes whose reading some metric's limit needs."""
    shapes = [(1, 576)] + [(batch, context) for context in rows.CONTEXTS for batch in rows.BATCHES] + [(32, 320)]
    return [shape.step_bytes(precision, batch, context) for batch, context in shapes]


def limit(metric: rows.Metric, shape: Shape, precision: str, limits: Limits) -> float | None:
    """What the machine allows for a metric, in its unit; None where no simple limit is known."""
    match metric.key.split():
        case ["a", "ttft"]:
            return 1000 * limits.prefill_s(shape, precision, 512)
        case ["a", "tpot"]:
            return 1000 * limits.read_s(shape.step_bytes(precision, 1, 576))
        case ["c", "prefill"]:
            return 2048 / limits.prefill_s(shape, precision, 2048)
        case ["b", "throughput"]:
            prefill_s = 32 * limits.prefill_s(shape, precision, 256)
            return 32 * 128 / (prefill_s + 127 * limits.read_s(shape.step_bytes(precision, 32, 320)))
        case ["d", "step", kind]:
            batch, context = map(int, kind.split("x"))
            return 1000 * limits.read_s(shape.step_bytes(precision, batch, context))
    return None
