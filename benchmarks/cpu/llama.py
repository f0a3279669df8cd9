"""llama.cpp by its own tools: llama-batched-bench for the rows, in a process of its own each.

Its prompts and outputs are made up inside it; sampling costs it nothing. Row d: one prompt is computed and its KV cache
copied to every request (-pps with a cache for each), so that decoding reads what it would read.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from typing import Any

from benchmarks.cpu import rows
from benchmarks.cpu.quiet import Guard

DECODE_STEPS = 8


class Tool:
    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.guard = Guard(job["guard"])
        self.start_s = 0.0
        self.peak_gib = 0.0

    def bench(self, prompt: int, output: int, batches: list[int], *, copied: bool = False) -> list[dict[str, Any]]:
        """One line per batch: its t_pp and t_tg are the seconds of all prompts and of all outputs."""
        tokens = max(batches) * (prompt + output)
        threads = str(self.job["threads"])
        command = [f"{self.job['bin']}/llama-batched-bench", "-m", self.job["model"], "-c", str(tokens)]
        command += ["-b", "2048", "-ub", "512", "-fa", "on", "-t", threads, "-tb", threads, "-no-kvu"]
        command += ["-npp", str(prompt), "-ntg", str(output), "-npl", ",".join(map(str, sorted(batches)))]
        command += ["--output-format", "jsonl"] + (["-pps"] if copied else [])
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.guard.children.append(process.pid)
        found = []
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                found.append(json.loads(line))
                self.start_s = time.monotonic() - start
        _, status, used = os.wait4(process.pid, 0)
        process.stdout.close()
        process.returncode = os.waitstatus_to_exitcode(status)
        self.guard.children.remove(process.pid)
        self.peak_gib = used.ru_maxrss / 2**20
        if process.returncode or len(found) != len(batches):
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode} after {len(found)} lines")
        return found

    def one_stream(self) -> dict[str, float]:
        [line] = self.bench(512, 128, [1])
        return {"a ttft": 1000 * line["t_pp"], "a tpot": 1000 * line["t_tg"] / 128, "g memory": self.peak_gib}

    def at_once(self) -> dict[str, float]:
        [line] = self.bench(256, 128, [32])
        return {"b throughput": 32 * 128 / (line["t_pp"] + line["t_tg"])}

    def prefill(self) -> dict[str, float]:
        [line] = self.bench(2048, 1, [1])
        return {"c prefill": 2048 / line["t_pp"]}

    def decode(self, context: int, batches: list[int]) -> dict[str, float]:
        lines = self.bench(context, DECODE_STEPS, batches, copied=True)
        return {rows.step_key(line["pl"], context): 1000 * line["t_tg"] / DECODE_STEPS for line in lines}

    def started(self) -> dict[str, float]:
        self.bench(32, 1, [1])
        return {"f start": self.start_s}


def run(job: dict[str, Any]) -> dict[str, Any]:
    tool, asked = Tool(job), job["rows"]
    found: dict[str, float] = {}
    if "f" in asked:
        found |= tool.guard("f", tool.started)
    if "a" in asked or "g" in asked:
        found |= tool.guard("a", tool.one_stream)
    if "c" in asked:
        found |= tool.guard("c", tool.prefill)
    if "b" in asked:
        found |= tool.guard("b", tool.at_once)
    if "d" in asked:
        for context, batches in rows.step_shapes(job["quick"]):
            found |= tool.guard(
                f"d {context}",
                lambda context=context, batches=batches: tool.decode(context, batches),  # type: ignore[misc]  # bound now
            )
    return {"metrics": found, "others": tool.guard.others, "versions": {"llama.cpp": job["llama"]}}
