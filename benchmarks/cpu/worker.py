"""In a process of its own: load one engine, warm up, measure rows, write the figures, exit. worker.py JOB.json OUT.json

A job is what __main__.py writes. Standard library only, apart from the engine: this runs in the peers' environments.
"""

from __future__ import annotations

import importlib
import json
import random
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from benchmarks.cpu import rows
from benchmarks.cpu.quiet import Guard

WARM_STEPS, STEPS = 2, 8
GREEDY: dict[str, Any] = {"temperature": 0.0}


class Engine(Protocol):
    """One engine, a step at a time. Every output is greedy unless `sampling` says more, and ignores end of text."""

    versions: dict[str, str]
    busy: bool

    def add(self, id: int, prompt: list[int], max_tokens: int, sampling: dict[str, Any]) -> None: ...
    def step(self) -> dict[int, int]:
        """Do one step. How many tokens each request got."""
        ...

    def cancel(self, ids: Iterable[int]) -> None: ...


class Bench:
    """The rows on one engine. Prompts are random and never repeat."""

    def __init__(self, engine: Engine, job: dict[str, Any]) -> None:
        self.engine, self.job = engine, job
        self._random = random.Random(job["seed"])
        self._next_id = 0

    def prompts(self, count: int, length: int) -> list[list[int]]:
        return [[self._random.randrange(1, self.job["vocab"]) for _ in range(length)] for _ in range(count)]

    def add(self, prompts: list[list[int]], output: int, sampling: dict[str, Any] = GREEDY) -> list[int]:
        ids = list(range(self._next_id, self._next_id + len(prompts)))
        self._next_id += len(prompts)
        for id, prompt in zip(ids, prompts, strict=True):
            self.engine.add(id, prompt, output, sampling)
        return ids

    def stream(self, count: int, prompt: int, output: int) -> tuple[float, float]:
        """Seconds until every request has its first token, and until all have everything."""
        prompts = self.prompts(count, prompt)
        start = time.perf_counter()
        waiting, got = set(self.add(prompts, output)), 0
        first = 0.0
        while self.engine.busy:
            tokens = self.engine.step()
            got += sum(tokens.values())
            if waiting:
                waiting -= {id for id, number in tokens.items() if number}
                first = time.perf_counter() - start
        whole = time.perf_counter() - start
        if got != count * output:
            raise RuntimeError(f"asked for {count * output} tokens, got {got}")
        return first, whole

    def one_stream(self) -> dict[str, float]:
        taken = [self.stream(1, 512, 128) for _ in range(2)]
        ttft_s = statistics.median(first for first, _ in taken)
        tpot_s = statistics.median((whole - first) / 127 for first, whole in taken)
        return {"a ttft": 1000 * ttft_s, "a tpot": 1000 * tpot_s}

    def at_once(self) -> dict[str, float]:
        return {"b throughput": 32 * 128 / self.stream(32, 256, 128)[1]}

    def prefill(self) -> dict[str, float]:
        self.stream(1, 2048, 1)  # the first of this shape compiles, where an engine compiles for shapes
        return {"c prefill": 2048 / statistics.median(self.stream(1, 2048, 1)[0] for _ in range(2))}

    def decode(self, context: int, batches: list[int]) -> dict[str, float]:
        """Steps of each batch: all requests are prefilled once, then some leave, and so on."""
        ids = self.add(self.prompts(batches[0], context), 100 + context)
        found = {}
        for batch in batches:
            self.engine.cancel(ids[batch:])
            ids = ids[:batch]
            found[rows.step_key(batch, context)] = 1000 * statistics.median(self._steps(ids, STEPS))
        self._end(ids)
        return found

    def sampling(self) -> dict[str, float]:
        """Milliseconds a step over greedy, by kind; greedy is taken before, between and after."""
        kinds = dict(rows.KINDS)
        kinds["all three"] = {key: value for kind in reversed(rows.KINDS.values()) for key, value in kind.items()}
        greedy, costs = self._sampled(GREEDY), {}
        for name, kind in kinds.items():
            seconds = self._sampled(kind)
            after = self._sampled(GREEDY)
            costs[f"e {name}"] = 1000 * (seconds - (greedy + after) / 2)
            greedy = after
        return costs

    def _sampled(self, sampling: dict[str, Any]) -> float:
        ids = self.add(self.prompts(32, 32), 64, sampling)
        seconds = statistics.median(self._steps(ids, 6))
        self._end(ids)
        return seconds

    def _steps(self, ids: list[int], count: int) -> list[float]:
        """Seconds of `count` steps in which each of `ids` gets a token, after WARM_STEPS such steps."""
        taken: list[float] = []
        while len(taken) < WARM_STEPS + count:
            start = time.perf_counter()
            tokens = self.engine.step()
            if sum(id in tokens for id in ids) == len(ids):
                taken.append(time.perf_counter() - start)
            else:
                taken.clear()
        return taken[WARM_STEPS:]

    def _end(self, ids: list[int]) -> None:
        self.engine.cancel(ids)
        while self.engine.busy:
            self.engine.step()


def peak_memory_gib() -> float:
    """The most that this process has had in memory, pages of files included."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def run(job: dict[str, Any]) -> dict[str, Any]:
    module = importlib.import_module(f"benchmarks.cpu.engine_{job['kind']}")
    engine = module.make(job)
    bench, guard = Bench(engine, job), Guard(job["guard"])
    bench.stream(1, 32, 1)
    found = {"f start": time.monotonic() - job["started_s"]}
    bench.stream(1, 512, 8)  # warm
    if "a" in job["rows"]:
        found |= guard("a", bench.one_stream)
    found["g memory"] = peak_memory_gib()
    if "c" in job["rows"]:
        found |= guard("c", bench.prefill)
    if "b" in job["rows"]:
        found |= guard("b", bench.at_once)
    if "d" in job["rows"]:
        for context, batches in rows.step_shapes(job["quick"]):
            found |= guard(f"d {context}", lambda context=context, batches=batches: bench.decode(context, batches))  # type: ignore[misc]  # bound now
    if "e" in job["rows"]:
        found |= guard("e", bench.sampling)
    asked = {key: value for key, value in found.items() if key[0] in job["rows"]}
    return {"metrics": asked, "others": guard.others, "versions": engine.versions}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    kind = job["kind"]
    if job["rows"] == "h":
        from benchmarks.cpu.served import run as run_rows
    elif kind == "llama":
        from benchmarks.cpu.llama import run as run_rows
    else:
        run_rows = run
    Path(sys.argv[2]).write_text(json.dumps(run_rows(job)))


if __name__ == "__main__":
    main()
