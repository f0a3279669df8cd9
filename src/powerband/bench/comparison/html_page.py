"""The page of a comparison: runs side by side, each against the first.

    comparison_html ─► {names, runs: [{name, facts}], warnings, settings: [name, a value of each run], same: likewise,
                        grid, loads: [{label, rates: rows of texts, figures: [{name, rows, quantiles, limit}]}]}

Of each figure: rows [statistic, value of each run, ratio to the first, its 95 % interval, verdict], and of each run the
values at `grid`, null where it has none. Latencies in seconds.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from powerband.bench.report.compare import (
    COMPARED,
    Comparison,
    Difference,
    FigureComparison,
    PointComparison,
    StoredRun,
    common_points,
    compare_runs,
    figure_values,
    judged_requests,
)
from powerband.bench.report.compare_table import NOTE, RATES
from powerband.bench.report.page_data import GRID
from powerband.bench.report.table import subject
from powerband.html_page import page_html, write_page
from powerband.metrics.record import percentile
from powerband.metrics.shown import FIGURES, NONE, digits, plain, share_text, time_text

_CURVES = tuple(name for name in COMPARED if name != "service_ttft")
MAX_VALUE = 120  # characters of a setting


def write_comparison(runs: Sequence[StoredRun], path: Path) -> None:
    """Raises UsageError for runs with no load in common, EnvironmentFault when it cannot be written."""
    write_page(comparison_html(runs), path)


def comparison_html(runs: Sequence[StoredRun]) -> str:
    """runs: at least two; all are compared with the first."""
    names = run_names(runs)
    return page_html("bench/comparison", title=f"{' and '.join(names)}: powerband bench", data=comparison_data(runs))


def comparison_data(runs: Sequence[StoredRun]) -> dict[str, Any]:
    names = run_names(runs)
    comparisons = [compare_runs(runs[0], run) for run in runs[1:]]
    settings = list(_settings([run.report for run in runs]))
    return {
        "names": names,
        "runs": [_run(name, run) for name, run in zip(names, runs, strict=True)],
        "warnings": [
            f"{name}: {plain(warning)}"
            for name, comparison in zip(names[1:], comparisons, strict=True)
            for warning in comparison.warnings
        ],
        "settings": [(name, values) for name, values in settings if len(set(values)) > 1],
        "same": [(name, values[0]) for name, values in settings if len(set(values)) == 1],
        "grid": GRID,
        "loads": list(_loads(runs, comparisons)),
        "note": NOTE.replace("B − A", "the difference to the first run").replace("these two runs", "the runs"),
    }


def run_names(runs: Sequence[StoredRun]) -> list[str]:
    """The folders' names, in full where they would be alike."""
    short = [run.folder.resolve().name for run in runs]
    names = short if len(set(short)) == len(short) else [str(run.folder) for run in runs]
    return [plain(name) for name in names]


def _run(name: str, run: StoredRun) -> dict[str, Any]:
    verdicts = [f"{plain(point.label)} {point.verdict}" for point in run.report.points]
    return {
        "name": name,
        "facts": [
            ("Measured", plain(subject(run.report))),
            ("Started", run.report.started_at),
            ("Verdict", ", ".join(verdicts)),
            ("Folder", plain(str(run.folder))),
            ("Command", plain(shlex.join(run.report.command))),
        ],
    }


def _settings(reports: Sequence[Any]) -> Iterator[tuple[str, list[str]]]:
    """Of each setting its value in each run, as text."""
    flat = [dict(_flattened(_described(report))) for report in reports]
    for name in dict.fromkeys(name for one in flat for name in one):
        yield plain(name), [plain(one.get(name, NONE)) for one in flat]


def _described(report: Any) -> dict[str, Any]:
    slo = report.slo
    return {
        "server": f"{report.target.base}, {report.server.kind} {report.server.version}",
        "model": report.target.model,
        "endpoint": report.target.endpoint,
        "context": report.server.max_model_len,
        "SLO": f"{slo} for {slo.attainment * 100:g} % of requests" if slo is not None else "none",
        "seed": report.seed,
        "warm-up": f"{report.warm_up * 100:g} %",
        "cool-down": f"{report.cool_down * 100:g} %",
        "client": f"{report.machine.processor}, {report.machine.cpus} cores, {report.machine.system}",
        "Powerband": report.powerband,
        "workload": report.workload,
    }


def _flattened(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{before}{name} ")
        elif isinstance(value, list | tuple) and all(isinstance(one, Mapping) for one in value):
            for number, one in enumerate(value, 1):
                yield from _flattened(one, f"{before}{name} " + (f"{number} " if len(value) > 1 else ""))
        else:
            text = f"{value:g}" if isinstance(value, float) else NONE if value is None else str(value)
            yield f"{before}{name}", text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]} …"


def _loads(runs: Sequence[StoredRun], comparisons: Sequence[Comparison]) -> Iterator[dict[str, Any]]:
    """Of each load of the first run that others have, too."""
    pairs = [dict(common_points(runs[0].report, run.report)) for run in runs[1:]]
    for number, point in enumerate(runs[0].report.points):
        places = [number, *(found.get(number) for found in pairs)]
        compared = [
            comparison.points[list(found).index(number)] if number in found else None
            for found, comparison in zip(pairs, comparisons, strict=True)
        ]
        if any(compared):
            values = [_values(run, place) for run, place in zip(runs, places, strict=True)]
            limits = point.summary.slo.limits if point.summary.slo is not None else {}
            yield {
                "label": plain(point.label),
                "paired": [one.paired if one is not None else None for one in compared],
                "rates": list(_rates(compared)),
                "figures": [
                    {
                        "name": FIGURES[name],
                        "rows": rows,
                        "quantiles": [_quantiles(one.get(name)) for one in values] if name in _CURVES else [],
                        "limit": limits.get(name),
                    }
                    for name in FIGURES
                    if (rows := list(_rows(name, compared)))
                ],
            }


def _values(run: StoredRun, place: int | None) -> dict[str, list[float]]:
    if place is None:
        return {}
    requests = judged_requests(run, place)
    return {name: sorted(figure_values(requests, name).values()) for name in _CURVES}


def _quantiles(ordered: Sequence[float] | None) -> list[float] | None:
    return [float(f"{percentile(ordered, q):.4g}") for q in GRID] if ordered else None


def _rows(name: str, compared: Sequence[PointComparison | None]) -> Iterator[list[Any]]:
    """[statistic, the first run's value, then of each other run [value, ratio, interval, verdict]]."""
    figures = [point.figures.get(name) if point is not None else None for point in compared]
    for statistic in ("p50", "p99"):
        differences = [_difference(figure, statistic) for figure in figures]
        first = next((one.a_s for one in differences if one is not None and one.a_s is not None), None)
        if first is not None:
            yield [
                statistic,
                time_text(first),
                [
                    _cells(one, figure.effect if figure is not None else "")
                    for one, figure in zip(differences, figures, strict=True)
                ],
            ]


def _difference(figure: FigureComparison | None, statistic: str) -> Difference | None:
    if figure is None:
        return None
    return figure.median if statistic == "p50" else figure.p99


def _cells(one: Difference | None, effect: str) -> tuple[str, str, str, str]:
    """Value, ratio to the first run, its 95 % interval (of the difference, over the first value), verdict."""
    if one is None or one.b_s is None:
        return NONE, NONE, "", ""
    spread = ""
    if one.interval_s is not None and one.a_s:
        low, high = (1 + edge / one.a_s for edge in one.interval_s)
        spread = f"{low:.2f}–{high:.2f}"
    verdict = NONE if one.verdict == "too few requests" else one.verdict
    if effect and one.verdict in ("faster", "slower"):
        verdict = f"{one.verdict} ({effect})"
    return time_text(one.b_s), f"{one.ratio:.2f}×" if one.ratio is not None else NONE, spread, verdict


def _rates(compared: Sequence[PointComparison | None]) -> Iterator[list[Any]]:
    """[name, the first run's, then of each other run [value, ratio]]."""
    for name, shown in RATES.items():
        pairs = [point.rates[name] if point is not None else (None, None) for point in compared]
        first = next((a for a, _ in pairs if a is not None), None)
        if first is not None:
            text_of = share_text if name == "attainment" else digits
            others = [(text_of(b), f"{b / first:.2f}×" if b is not None and first else NONE) for _, b in pairs]
            yield [shown, text_of(first), others]
