"""How long prompts and outputs were: as the schedule asked, and as the server counted them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from powerband.bench.load import LoadResult
from powerband.metrics.record import Outcome, percentile
from powerband.metrics.shown import digits
from powerband.spec.workload.schedule import Schedule

MAX_BINS = 30
_LOGARITHMIC = 8.0  # times the least that the greatest is: from here on, bins widen with the length


def length_distributions(load: LoadResult) -> list[dict[str, Any]]:
    """Of prompts and of outputs: {name, edges, asked, got: requests by bin, rows: texts}. Nothing that is unknown.

    asked: every request that was sent; got: those that were answered, counted by the server.
    """
    planned = dict(_planned(load.schedule))
    sent = [planned[sample.index] for sample in load.samples if sample.index in planned]
    answered = [sample for sample in load.samples if sample.outcome is Outcome.OK]
    asked = [[prompt for prompt, _ in sent], [output for _, output in sent]]
    got = [[sample.prompt_tokens for sample in answered], [sample.output_tokens for sample in answered]]
    found = []
    for name, wanted, counted in zip(("Prompts", "Outputs"), asked, got, strict=True):
        lengths = {"asked": [n for n in wanted if n > 0], "got": [n for n in counted if n > 0]}
        if any(lengths.values()):
            edges = _edges([n for side in lengths.values() for n in side])
            counts = {side: _counts(values, edges) for side, values in lengths.items()}
            rows = [(side, *_texts(values)) for side, values in lengths.items()]
            found.append({"name": name, "edges": edges, **counts, "rows": rows})
    return found


def _planned(schedule: Schedule) -> Iterator[tuple[int, tuple[int, int]]]:
    """Each request's index, with the tokens of its prompt (of a later turn, with what was said before) and output."""
    for chain in schedule.chains:
        history = 0
        for request in chain.requests:
            history = history if request.turn else 0
            prompt = history + request.new_tokens
            yield request.index, (prompt, request.output_tokens)
            history = prompt + request.output_tokens


def _edges(lengths: Sequence[int]) -> list[float]:
    """Of at most MAX_BINS bins, each from its own edge up to the next one, without it."""
    low, high = min(lengths), max(lengths) + 1
    if high - low <= MAX_BINS:
        return [float(edge) for edge in range(low, high + 1)]
    if high / low < _LOGARITHMIC:
        width = math.ceil((high - low) / MAX_BINS)
        return [float(edge) for edge in range(low, high + width, width)]
    edges = [low * (high / low) ** (number / MAX_BINS) for number in range(MAX_BINS)]
    return [*sorted({float(math.floor(edge)) for edge in edges}), float(high)]


def _counts(lengths: Sequence[int], edges: Sequence[float]) -> list[int]:
    import numpy as np

    return [int(count) for count in np.histogram(lengths, bins=edges)[0]]


def _texts(lengths: Sequence[int]) -> tuple[str, ...]:
    """Requests, mean, p50, p95, maximum, sum."""
    if not lengths:
        return ("0", *["–"] * 5)
    ordered = sorted(lengths)
    figures = (sum(ordered) / len(ordered), percentile(ordered, 50), percentile(ordered, 95), ordered[-1])
    return (f"{len(ordered):,}", *(digits(value) for value in figures), f"{sum(ordered):,}")
