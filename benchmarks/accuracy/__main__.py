"""How near latency model, simulator and memory plan come: `python -m benchmarks.accuracy` (make accuracy).

error = |predicted − measured| / measured. Groups are listed the worst first. --quick: every eighth row of the closed
loop. The result goes to benchmarks/results/accuracy.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.accuracy import capacity, closed_loop, open_loop, operators, requests, saturation, tables

from powerband import __version__
from powerband.calibration.curve_fit import FitErrors

RESULT = Path(__file__).resolve().parents[1] / "results" / "accuracy.json"


@dataclass(slots=True)
class Section:
    """A line of the table. target, worst_target: for the median, and for that of each group."""

    name: str
    target: float | None = None
    worst_target: float | None = None
    field_has: str = ""
    predicted: list[float] = field(default_factory=list)
    measured: list[float] = field(default_factory=list)
    bands: list[float] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)

    def add(self, group: str, predicted: float, measured: float, band: float = float("nan")) -> None:
        self.predicted.append(predicted)
        self.measured.append(measured)
        self.bands.append(band)
        self.groups.append(group)

    @property
    def errors(self) -> FitErrors:
        return FitErrors.from_values(self.predicted, self.measured)

    @property
    def inside(self) -> float:
        """Share of measurements inside the band; NaN: there is none."""
        size = np.abs(np.array(self.predicted) / np.array(self.measured) - 1)
        return float((size <= np.array(self.bands)).mean()) if not np.isnan(self.bands).any() else float("nan")

    def by_group(self) -> dict[str, FitErrors]:
        """The worst first."""
        members = defaultdict(list)
        for index, group in enumerate(self.groups):
            members[group].append(index)
        found = {
            group: FitErrors.from_values([self.predicted[i] for i in indices], [self.measured[i] for i in indices])
            for group, indices in members.items()
        }
        return dict(sorted(found.items(), key=lambda item: -item[1].median))

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        worst = next(iter(self.by_group().values())).median
        return self.errors.median <= self.target and (self.worst_target is None or worst <= self.worst_target)


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    options.add_argument("--quick", action="store_true", help="every eighth row of the closed loop")
    options.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    arguments = options.parse_args()
    if tables.folder() is None:
        raise SystemExit("The measured tables are not here. Name their folder in ACCURACY_DATA.")
    start = time.perf_counter()
    sections: list[Section] = []
    for made in (
        _operators,
        lambda: _closed_loop(8 if arguments.quick else 1, arguments.workers),
        _requests,
        _saturation,
        _open_loop,
        _capacity,
    ):
        for section in made():
            sections.append(section)
            _show(section)
    _summary(sections)
    seconds = time.perf_counter() - start
    print(f"{seconds:.0f} s")
    if not arguments.quick:
        RESULT.write_text(json.dumps(_result(sections, seconds), indent=1) + "\n")
        print(RESULT)
    sys.exit(any(section.met is False for section in sections))


def _operators() -> Iterable[Section]:
    for name, compare, target, field_has in operators.OPERATORS:
        section = Section(name, target, None, field_has)
        for table in compare():
            for predicted, measured in zip(table.predicted, table.measured, strict=True):
                section.add(table.name, predicted, measured, table.band)
        yield section


def _closed_loop(stride: int, workers: int) -> Iterable[Section]:
    rows = closed_loop.rows()[::stride]
    tpot = Section("closed loop, TPOT", 0.10, 0.15, "AIConfigurator 8.3 %, as labelled 12.8 %")
    formula = Section("closed loop, TPOT by the closed form")
    ttft = Section("closed loop, TTFT, InferenceX rows", 0.20, None, "AIConfigurator 24-49 %")
    burst = Section("closed loop, TTFT, the others, with the start's burst", 0.20, None, "AIConfigurator 24-49 %")
    with ProcessPoolExecutor(workers) as pool:
        for row, found in zip(rows, pool.map(closed_loop.predict, rows, chunksize=4), strict=True):
            group = " ".join(row.group[:-1]) + f" tp{row.group[-1]}"
            tpot.add(group, found.tpot_s, row.tpot_s, found.band)
            (ttft if row.varied else burst).add(group, found.ttft_s, row.ttft_s, found.band)
            simple = closed_loop.closed_form(row)
            formula.add(group, simple.tpot_s, row.tpot_s, simple.band)
    return [section for section in (tpot, formula, ttft, burst) if section.predicted]


def _requests() -> Iterable[Section]:
    section = Section("per request, arrivals given", 0.10, 0.15, "inference-sim claims 7 % E2E, 18 % TTFT")
    for figure, statistics in requests.compare().items():
        for statistic, (predicted, measured) in statistics.items():
            section.add(f"{figure} {statistic}", predicted, measured)
    return [section]


def _saturation() -> Iterable[Section]:
    section = Section("saturation, output tokens/s", 0.12)
    for row in saturation.rows():
        found = saturation.predict(row)
        if found is None:
            print(f"does not fit: {row}")
        else:
            section.add(" ".join(row.group[:-1]) + f" tp{row.group[-1]}", found[0], row.tokens_per_s, found[1])
    return [section]


def _open_loop() -> Iterable[Section]:
    tpot, e2e = Section("open loop of chats, TPOT"), Section("open loop of chats, E2E")
    for found in open_loop.compare():
        tpot.add(found.group, *found.tpot_s, found.band)
        e2e.add(found.group, *found.e2e_s, found.band)
    return [tpot, e2e]


def _capacity() -> Iterable[Section]:
    section = Section("KV capacity, blocks", 0.03, 0.03)
    for name, predicted, measured in capacity.compare():
        section.add(name, predicted, measured)
    return [section]


def _show(section: Section) -> None:
    print(f"\n{section.name}")
    for group, errors in section.by_group().items():
        print(f"  {group:58} {_line(errors)}")
    sys.stdout.flush()


def _summary(sections: Sequence[Section]) -> None:
    print(f"\n{'':58} {'n':>6} {'median':>7} {'mean':>7} {'P90':>7} {'bias':>7} {'in band':>8}  target")
    for section in sections:
        inside = "" if np.isnan(section.inside) else f"{section.inside:.0%}"
        target = "" if section.target is None else f"≤ {section.target:.0%}"
        if section.worst_target is not None:
            target += f", each ≤ {section.worst_target:.0%}"
        verdict = {True: " met", False: " MISSED", None: ""}[section.met]
        field_has = f"  (field: {section.field_has})" if section.field_has else ""
        print(f"{section.name:58} {_line(section.errors)} {inside:>8}  {target}{verdict}{field_has}")


def _line(errors: FitErrors) -> str:
    return f"{errors.n:6} {errors.median:7.1%} {errors.mean:7.1%} {errors.p90:7.1%} {errors.bias:+7.1%}"


def _result(sections: Sequence[Section], seconds: float) -> dict[str, Any]:
    return {
        "command": "python -m benchmarks.accuracy",
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(seconds),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"powerband": __version__, "python": platform.python_version()},
        "sections": [
            {
                "name": section.name,
                "target": section.target,
                "worst_target": section.worst_target,
                "field": section.field_has,
                "met": section.met,
                "errors": _rounded(section.errors),
                "in_band": None if np.isnan(section.inside) else round(section.inside, 4),
                "groups": {group: _rounded(errors) for group, errors in section.by_group().items()},
            }
            for section in sections
        ],
    }


def _rounded(errors: FitErrors) -> dict[str, float]:
    return {name: round(value, 4) for name, value in asdict(errors).items()}


if __name__ == "__main__":
    main()
