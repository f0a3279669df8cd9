"""Runs synthetic steps on an engine's executor and times them: the data that a latency model is fitted to.

    steps = Steps(engine)
    steps.seconds(decode(rows=8, context=512))         the median of several runs of one shape

All requests are greedy, as the load generator's are. Every work has blocks of its own as far as the cache has them.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from powerband.core.kv_cache import NO_PAGE
from powerband.core.params import SamplingParams
from powerband.core.step import NewRequest, Step, Work
from powerband.cost.step_log import StepSample
from powerband.engine.build import Engine

MAX_RUNS = 9
_MAX_CONTEXT = 2048
_DECODES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_CHUNKS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
_MIXED = ((64, 4), (256, 16), (512, 8), (128, 32))
_GOLDEN = (5**0.5 - 1) / 2
_MIN_SHAPES = 16  # shapes, however long they take
_GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class StepShape:
    """works: (new tokens, context after them) of each request. sampled: the first `sampled` works yield a token."""

    works: tuple[tuple[int, int], ...]
    sampled: int


def decode(rows: int, context: int) -> StepShape:
    """One token of each of `rows` requests that have seen `context`."""
    return StepShape(((1, context),) * rows, rows)


def prefill(tokens: int, cached: int = 0, *, rows: int = 0, context: int = 1) -> StepShape:
    """A prompt's last chunk after `cached` tokens, optionally together with decodes."""
    return StepShape(((tokens, cached + tokens), *((1, context),) * rows), rows + 1)


def grid(max_context: int, budget: int, seats: int) -> list[StepShape]:
    """Decodes and chunks, alone and together. max_context: tokens; budget: tokens of a step; seats: requests at once.

    In an order in which any first part covers the whole range.
    """
    max_context = min(max_context, _MAX_CONTEXT)
    decodes = [decode(rows, context) for rows in _DECODES for context in (16, max_context // 4, max_context - 1)]
    chunks = [prefill(new, cached) for new in _CHUNKS for cached in (0, max_context // 2)]
    mixed = [prefill(new, rows=rows, context=max_context // 4) for new, rows in _MIXED]
    fitting = [
        shape
        for shape in [*decodes, *chunks, *mixed]
        if len(shape.works) <= seats
        and sum(new for new, _ in shape.works) <= budget
        and max(context for _, context in shape.works) <= max_context
    ]
    # Multiples of the golden section fill a line evenly (Knuth 1973, section 6.4).
    order = sorted(range(len(fitting)), key=lambda index: index * _GOLDEN % 1.0)
    return [fitting[index] for index in order]


def copy_bytes_per_s(device: torch.device, size: int = 1 << 30) -> float:
    """The peak bandwidth of a copy within the device's memory: bytes read and written per second."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        _finish(device)
        start_s = time.perf_counter()
        target.copy_(source)
        _finish(device)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start_s))
    return best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class StepBenchmark:
    """Synthetic steps on an executor that nothing else uses."""

    def __init__(self, engine: Engine, *, seed: int = 0) -> None:
        self._executor = engine.executor
        self._layout = engine.memory.layout
        self._num_blocks = engine.memory.num_blocks
        self._vocab_size = engine.spec.vocab_size
        self.max_model_len = engine.memory.max_model_len
        self._random = random.Random(seed)  # noqa: S311 (no secret)
        self._index = itertools.count(1)
        self._past: list[str] = []  # ids that the executor may forget

    def fits(self, shape: StepShape) -> bool:
        """Whether every work's context can be, and all of them together have blocks of their own."""
        blocks = sum(self._held(*work).count(True) for work in shape.works)
        return blocks <= self._num_blocks and all(context <= self.max_model_len for _, context in shape.works)

    def seconds(self, shape: StepShape, budget_s: float = 0.3) -> float:
        """The median of up to MAX_RUNS runs within about `budget_s`; a first one, to warm up, is left out."""
        works = self._works(shape)
        self._run(works)
        # The engine knows them from here on: the same positions once more.
        again = [Work(work.id, 0, work.start, work.num_tokens, [], work.samples) for work in works]
        taken: list[float] = []
        while not taken or (len(taken) < MAX_RUNS and sum(taken) + taken[-1] / 2 < budget_s):
            taken.append(self._run(again))
        self._past = [work.id for work in works]
        return statistics.median(taken)

    def samples(
        self, shapes: Sequence[StepShape], budget_s: float, on_progress: Callable[[float], object] = lambda _share: None
    ) -> list[StepSample]:
        """Times the `shapes` that fit, for about `budget_s`. on_progress: called with the fraction that is done."""
        fitting = [shape for shape in shapes if self.fits(shape)]
        found: list[StepSample] = []
        began_s = time.perf_counter()
        for number, shape in enumerate(fitting, 1):
            spent = (time.perf_counter() - began_s) / budget_s
            if spent > 1 and len(found) >= _MIN_SHAPES:
                break
            each_s = budget_s * max(1 - spent, 0.0) / (len(fitting) - len(found)) / 2  # half of it warms up
            found.append(StepSample(shape.works, shape.sampled, self.seconds(shape, each_s)))
            on_progress(max(number / len(fitting), min(spent, 1.0)))
        return found

    def _held(self, new: int, context: int) -> list[bool]:
        """Of each entry of a work's block table: whether anything that the work computes can see it."""
        layout = self._layout
        first = (context - new - layout.window + 1) // layout.block_size
        return [
            group < layout.full or index >= first
            for index in range(-(-context // layout.block_size))
            for group in range(layout.groups)
        ]

    def _run(self, works: Sequence[Work]) -> float:
        step = Step(next(self._index), list(works), self._past)
        self._past = []
        start_s = time.perf_counter()
        result = self._executor.submit(step).result()
        seconds = time.perf_counter() - start_s
        for error in result.failed.values():
            raise RuntimeError(error.message)
        return seconds

    def _works(self, shape: StepShape) -> list[Work]:
        made, block = [], 0
        for place, (new, context) in enumerate(shape.works):
            blocks = []
            for is_held in self._held(new, context):
                blocks.append(block % self._num_blocks if is_held else NO_PAGE)
                block += is_held
            tokens = self._random.choices(range(self._vocab_size), k=context)
            made.append(
                Work(
                    f"{next(self._index)}",
                    0,
                    context - new,
                    new,
                    blocks,
                    place < shape.sampled,
                    new=NewRequest(tokens, context, _GREEDY),
                )
            )
        return made
