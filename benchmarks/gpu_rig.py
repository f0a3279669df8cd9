"""An engine core on one device without server or settings, and steps of an exact shape: for gpu_check.py."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from powerband.core.admission import SchedulerLimits
from powerband.core.clock import MonotonicClock
from powerband.core.kv_cache import KVCacheManager
from powerband.core.loop import Add, Command, EngineCore
from powerband.core.params import SamplingParams
from powerband.core.request import EngineRequest
from powerband.core.scheduler import Scheduler
from powerband.core.step import NewRequest, Step, Work
from powerband.engine.attention import AttentionBatch, BackendSelection
from powerband.engine.executor.cuda_graphs import DecodeGraphs, can_capture
from powerband.engine.executor.local import ExecutorConfig, TorchExecutor
from powerband.spec.model.model_spec import ModelSpec

SEED = 0
BLOCK_SIZE = 32


class Rig:
    """An engine core over one device, fed from a list."""

    def __init__(
        self, spec: ModelSpec, folder: Path, device: torch.device, *, overlap: bool, graphs: bool, **options: Any
    ) -> None:
        self.commands: list[Command] = []
        self.max_rows = options.get("max_rows", 16)
        self.captures = captures = graphs and can_capture(options["attention"])
        self.config = ExecutorConfig(
            spec=spec,
            folder=folder,
            load_format=options.get("load_format", "auto"),
            device=device,
            dtype=options["dtype"],
            kv_dtype=options["dtype"],
            max_model_len=options["max_model_len"],
            block_size=BLOCK_SIZE,
            seed=SEED,
            attention=BackendSelection(options["attention"], "asked for"),
            kernels=False,
            overlap=overlap,
            graph_rows=self.max_rows if captures and device.type == "cuda" else 0,
        )
        self.executor = TorchExecutor(self.config)
        self.executor.start()
        self.executor.init_kv_cache(options["num_blocks"])
        if captures and device.type == "cpu":
            self._use_imitated_graphs()
        kv = KVCacheManager(options["num_blocks"], BLOCK_SIZE)
        limits = SchedulerLimits(
            max_model_len=options["max_model_len"],
            max_num_seqs=self.max_rows,
            max_num_batched_tokens=options.get("max_num_batched_tokens", 2048),
        )
        self.core = EngineCore(Scheduler(kv, limits, relay=self.executor.relay), self.executor, MonotonicClock(), self)

    def poll(self, _now: float) -> list[Command]:
        taken, self.commands = self.commands, []
        return taken

    def next_time(self) -> float | None:
        return None

    def wait(self, _until: float | None) -> None:
        raise RuntimeError("the engine waits although there is work")

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        for index, prompt in enumerate(prompts):
            self.commands.append(Add(EngineRequest(id=f"{index}", token_ids=prompt, params=params, arrival_s=0.0)))
        outputs: dict[str, list[int]] = {f"{index}": [] for index in range(len(prompts))}
        while self.commands or self.core.busy:
            for output in self.core.step():
                if output.error is not None:
                    raise RuntimeError(f"request {output.id}: {output.error.message}")
                outputs[output.id] += output.token_ids
        return list(outputs.values())

    def close(self) -> None:
        """End it, and give its memory back now: the next rig needs it."""
        self.executor.close()
        del self.executor, self.core
        gc.collect()
        if self.config.device.type == "cuda":
            torch.cuda.empty_cache()

    def _use_imitated_graphs(self) -> None:
        runner = self.executor.runner
        runner.forward = DecodeGraphs(
            runner.model,
            self.executor.attention,
            max_rows=self.max_rows,
            max_model_len=self.config.max_model_len,
            block_size=BLOCK_SIZE,
            device=self.config.device,
            capture=_run_again,
        )


def _run_again(function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """What stands in for a captured graph on a CPU."""
    result = function()

    def replay() -> None:
        result.copy_(function())

    return replay, result


class Stepper:
    """Gives steps to the executor directly, so that a step's shape is exactly what is asked."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.vocab_size = rig.config.spec.vocab_size
        self.count = 0

    def decode_seconds(self, batch: int, context: int, num_steps: int) -> float:
        """Mean seconds of a decode step, two in flight where the executor overlaps."""
        ids = self._names(batch)
        per_row = -(-(context + num_steps + 8) // BLOCK_SIZE)
        works = [
            self._new(id, context, context - 1, 1, list(range(i * per_row, (i + 1) * per_row)))
            for i, id in enumerate(ids)
        ]
        handles = [self._submit(works)]
        warm_up = 5
        for k in range(1, num_steps + warm_up):
            if k == warm_up:
                while handles:
                    handles.pop(0).result()
                _wait(self.rig.config.device)
                start = time.perf_counter()
            handles.append(self._submit([Work(id, 0, context - 1 + k, 1, [], True) for id in ids]))
            if len(handles) >= self.rig.executor.depth:
                handles.pop(0).result()
        while handles:
            handles.pop(0).result()
        seconds = (time.perf_counter() - start) / num_steps
        self._drop(ids)
        return seconds

    def prefill_seconds(self, num_tokens: int, repetitions: int) -> float:
        times = []
        for _ in range(repetitions + 1):
            ids = self._names(1)
            blocks = list(range(-(-num_tokens // BLOCK_SIZE)))
            with timed(self.rig.config.device) as seconds:
                self._submit([self._new(ids[0], num_tokens, 0, num_tokens, blocks)]).result()
            times.append(seconds())
            self._drop(ids)
        return statistics.median(times[1:])

    def _names(self, count: int) -> list[str]:
        self.count += count
        return [f"r{self.count - i}" for i in range(count)]

    def _new(self, id: str, length: int, start: int, num_tokens: int, blocks: list[int]) -> Work:
        tokens = [(7 * p + 13) % self.vocab_size for p in range(length)]
        params = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
        return Work(id, 0, start, num_tokens, blocks, True, new=NewRequest(tokens, length, params))

    def _submit(self, works: list[Work]) -> Any:
        self.count += 1
        return self.rig.executor.submit(Step(self.count, works))

    def _drop(self, ids: list[str]) -> None:
        self.rig.executor.submit(Step(self.count, [], dropped=ids)).result()


@contextmanager
def timed(device: torch.device) -> Iterator[Callable[[], float]]:
    """Yields a function that tells the seconds between entering and leaving, the device's work included."""
    _wait(device)
    start = time.perf_counter()
    seconds = 0.0
    yield lambda: seconds
    _wait(device)
    seconds = time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def even_batch(new: int, context: int, rows: int, device: torch.device) -> AttentionBatch:
    """Rows of the same shape, each over neighbouring blocks of its own. `context` in whole blocks."""
    per_row = context // BLOCK_SIZE
    tables = torch.arange(rows * per_row, dtype=torch.int32, device=device).view(rows, per_row)
    positions = torch.arange(context - new, context, device=device)
    slots = tables[:, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    return AttentionBatch(
        query_starts=torch.arange(0, rows * new + 1, new, dtype=torch.int32, device=device),
        context_lens=torch.full((rows,), context, dtype=torch.int32, device=device),
        block_tables=tables,
        slots=slots.flatten(),
        num_decodes=rows if new == 1 else 0,
        query_starts_host=list(range(0, rows * new + 1, new)),
        context_lens_host=[context] * rows,
    )


def repeated_s(function: Callable[[], Any], device: torch.device, quick: bool) -> float:
    """Seconds of one run: on a GPU from a graph of several, so that launching them costs nothing."""
    function()
    count = 2 if quick else 10
    if device.type == "cpu":
        with timed(device) as seconds:
            for _ in range(count):
                function()
        return seconds() / count
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph):
        for _ in range(count):
            function()
    graph.replay()
    times = []
    for _ in range(5):
        with timed(device) as seconds:
            graph.replay()
        times.append(seconds() / count)
    return statistics.median(times)
