"""Two runs side by side: which was faster, by how much, and whether that is more than chance within them.

Requests are paired by their place in the schedule where both runs sent the same ones. Intervals come from a bootstrap
that draws stretches of neighbouring requests, because those wait in the same queue; what changes from one run of the
same thing to the next is in no interval of two runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from powerband.bench.report.result_files import RequestLine, read_requests, read_run
from powerband.bench.report.results import Point, RunReport
from powerband.errors import UsageError
from powerband.metrics.record import Outcome
from powerband.metrics.statistics import Interval, Samples, bootstrap, cliffs_delta, min_samples

SCHEMA = "powerband.bench.compare/1"
COMPARED = ("ttft", "service_ttft", "tpot", "stall", "e2e")
MIN_REQUESTS = 20  # requests on each side, for an interval
# Cliff's delta in words: Romano et al. 2006.
EFFECTS = ((0.147, "negligible"), (0.33, "small"), (0.474, "medium"), (math.inf, "large"))

Verdict = Literal["faster", "slower", "no difference shown", "too few requests"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One statistic of two runs, A and B."""

    a_s: float | None
    b_s: float | None
    interval_s: Interval | None  # of B − A, at 95 % confidence
    verdict: Verdict  # on B; 'too few requests' also where they depend on each other

    @property
    def ratio(self) -> float | None:
        """B / A."""
        return self.b_s / self.a_s if self.a_s and self.b_s is not None else None


@dataclass(frozen=True, slots=True)
class FigureComparison:
    """One figure of two runs."""

    count_a: int
    count_b: int
    median: Difference
    p99: Difference
    delta: float | None  # Cliff's delta, above 0 where B takes longer; None: too few requests
    effect: str  # in words; '': too few requests


@dataclass(frozen=True, slots=True)
class PointComparison:
    """One load in both runs."""

    label: str
    paired: bool  # requests were compared by index
    figures: dict[str, FigureComparison]
    rates: dict[str, tuple[float | None, float | None]]  # (A's, B's) goodput, attainment, throughput


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs, load by load."""

    run_a: str
    run_b: str
    warnings: tuple[str, ...]  # what makes the comparison unfair
    points: tuple[PointComparison, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with ratios."""
        made = {"schema": SCHEMA, **asdict(self)}
        for shown, point in zip(made["points"], self.points, strict=True):
            for name, figure in point.figures.items():
                shown["figures"][name]["median"]["ratio"] = figure.median.ratio
                shown["figures"][name]["p99"]["ratio"] = figure.p99.ratio
        return made


@dataclass(frozen=True, slots=True)
class StoredRun:
    """A run's folder and what is in it."""

    folder: Path
    report: RunReport
    requests: list[list[RequestLine]]  # of each of its points

    @classmethod
    def read(cls, folder: Path) -> StoredRun:
        """Raises UsageError for what is no run."""
        report = read_run(folder)
        return cls(folder, report, read_requests(folder, len(report.points)))


def compare(run_a: Path, run_b: Path) -> Comparison:
    """The runs in two folders. Raises UsageError for what is no run, and for runs with no load in common."""
    return compare_runs(StoredRun.read(run_a), StoredRun.read(run_b))


def compare_runs(run_a: StoredRun, run_b: StoredRun) -> Comparison:
    """Raises UsageError for runs with no load in common."""
    a, b = run_a.report, run_b.report
    pairs = common_points(a, b)
    warnings = [*_differences(a, b), *_weaknesses(a, b, pairs)]
    points = []
    for i, j in pairs:
        is_same = _same_requests(a, b, a.points[i], b.points[j])
        sides = judged_requests(run_a, i), judged_requests(run_b, j)
        points.append(_compared(a.points[i], b.points[j], *sides, paired=is_same))
    return Comparison(str(run_a.folder), str(run_b.folder), tuple(warnings), tuple(points))


def compare_samples(first: Sequence[float], second: Sequence[float], *, paired: bool) -> FigureComparison:
    """One figure of requests in the order of their arrival, in seconds. paired: equally many, each with its own."""
    import numpy as np

    def difference(q: float) -> Difference:
        min_requests = max(min_samples(q), MIN_REQUESTS)
        values = [float(np.percentile(side, q)) if len(side) >= min_samples(q) else None for side in (first, second)]
        if min(len(first), len(second)) < min_requests:
            return Difference(values[0], values[1], None, "too few requests")

        def difference(a: Samples, b: Samples) -> float:
            return float(np.percentile(b, q) - np.percentile(a, q))

        block = math.ceil(min(len(first), len(second)) ** (1 / 3))  # the order of the best length, Hall et al. 1995
        interval = bootstrap(first, second, difference, paired=paired, block=block)
        return Difference(values[0], values[1], interval, _verdict(interval))

    delta = cliffs_delta(first, second) if first and second else None
    effect = next(word for limit, word in EFFECTS if abs(delta) < limit) if delta is not None else ""
    return FigureComparison(len(first), len(second), difference(50), difference(99), delta, effect)


def _verdict(interval: Interval) -> Verdict:
    if interval[0] > 0:
        return "slower"
    return "faster" if interval[1] < 0 else "no difference shown"


def _compared(
    a: Point, b: Point, first: dict[int, RequestLine], second: dict[int, RequestLine], *, paired: bool
) -> PointComparison:
    if paired:
        both = first.keys() & second.keys()
        first, second = ({index: side[index] for index in sorted(both)} for side in (first, second))
    figures = {}
    for name in COMPARED:
        values_a, values_b = figure_values(first, name), figure_values(second, name)
        if paired:
            both = values_a.keys() & values_b.keys()
            values_a, values_b = ({index: side[index] for index in sorted(both)} for side in (values_a, values_b))
        if values_a and values_b:
            figures[name] = compare_samples(list(values_a.values()), list(values_b.values()), paired=paired)
    itl = _itl(a, b)
    if itl is not None:
        figures["itl"] = itl
    rates = {
        name: (getattr(a.summary, name), getattr(b.summary, name))
        for name in ("goodput", "attainment", "request_rate", "output_tokens_per_s")
    }
    label = a.label if a.label == b.label else f"{a.label} and {b.label}"
    return PointComparison(label, paired, figures, rates)


def _itl(a: Point, b: Point) -> FigureComparison | None:
    """Its samples depend on each other, so only the values are shown; the verdict is on TPOT."""
    sides = a.summary.figures.get("itl"), b.summary.figures.get("itl")
    if sides[0] is None or sides[1] is None:
        return None
    median, p99 = (
        Difference(sides[0].percentiles[q], sides[1].percentiles[q], None, "too few requests") for q in (50.0, 99.0)
    )
    return FigureComparison(sides[0].count, sides[1].count, median, p99, None, "")


def figure_values(requests: dict[int, RequestLine], figure: str) -> dict[int, float]:
    """Seconds by index."""
    values = ((index, getattr(request.record(), f"{figure}_s")) for index, request in requests.items())
    return {index: value for index, value in values if value is not None}


def judged_requests(run: StoredRun, number: int) -> dict[int, RequestLine]:
    """Successful requests of a point's window by index, in the order of their arrival."""
    window = run.report.points[number].summary.window
    kept = [line for line in run.requests[number] if line.outcome is Outcome.OK and line.scheduled_s in window]
    return {line.index: line for line in sorted(kept, key=lambda line: line.scheduled_s)}


def common_points(a: RunReport, b: RunReport) -> list[tuple[int, int]]:
    """Which points belong together: those with the same load, or the only ones."""
    if len(a.points) == len(b.points) == 1:
        return [(0, 0)]
    free = list(enumerate(b.points))
    pairs = []
    for i, point in enumerate(a.points):
        match = next((j for j, other in free if other.offered == point.offered), None)
        if match is not None:
            pairs.append((i, match))
            free = [(j, other) for j, other in free if j != match]
    if not pairs:
        loads = [", ".join(str(point.offered) for point in run.points) for run in (a, b)]
        raise UsageError(
            f"The runs have no load in common: {loads[0]}; {loads[1]}.", hint="Measure both at the same rates."
        )
    return pairs


def _same_requests(a: RunReport, b: RunReport, first: Point, second: Point) -> bool:
    """Whether the i-th request of both is the same: prompts and lengths follow from the seed and the mix alone."""
    if first.schedule_digest == second.schedule_digest:
        return True
    return first.seed == second.seed and all(
        a.workload.get(name) == b.workload.get(name) for name in ("requests", "max_model_len")
    )


def _differences(a: RunReport, b: RunReport) -> Iterator[str]:
    """In what was asked for. Servers may differ: that is what is compared."""
    sides = {
        "workloads": (a.workload, b.workload),
        "SLOs": (str(a.slo or "none"), str(b.slo or "none")),
        "models": (a.target.model, b.target.model),
        "endpoints": (a.target.endpoint, b.target.endpoint),
        "clients' machines": (a.machine, b.machine),
        "warm-up and cool-down": ((a.warm_up, a.cool_down), (b.warm_up, b.cool_down)),
    }
    for name, (first, second) in sides.items():
        if first != second:
            values = f" ({first} and {second})" if isinstance(first, str | int) else ""
            yield f"The {name} differ{values}."


def _weaknesses(a: RunReport, b: RunReport, pairs: Sequence[tuple[int, int]]) -> Iterator[str]:
    for name, run in (("A", a), ("B", b)):
        for point in run.points:
            which = name if point.label == "run" else f"{name} at {point.label}"
            if point.client.fault:
                yield f"{which} is INVALID: {point.client.fault}."
            elif point.stopped:
                yield f"{which} was stopped early."
    for first, second in ((a.points[i], b.points[j]) for i, j in pairs):
        if first.offered != second.offered:
            yield f"The loads differ ({first.offered} and {second.offered})."
        if first.seed != second.seed:
            yield f"The seeds differ ({first.seed} and {second.seed})."
    alone = len(a.points) + len(b.points) - 2 * len(pairs)
    if alone:
        yield f"{alone} of the loads are in one run only, and left out."
