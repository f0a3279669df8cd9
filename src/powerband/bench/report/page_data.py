"""What report.html shows, as plain values: texts as the table has them, and curves thinned until a page can hold them.

    page_data ─► {subject, headline, facts, slo, grid, definitions, points: [
                   {label, offered, verdict, sentence, tiles, rows, facts, failures, misses: texts and numbers
                    lengths: of prompts and outputs, see `length_distributions`
                    quantiles: figure → values at `grid`      timeline: bins      scatter: first tokens over time
                    server: its own series                    slowest: requests, chunk by chunk}]}

Times in seconds from the run's start, latencies in seconds.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from typing import Any

from powerband.bench.client.messages import Sample
from powerband.bench.load import LoadResult
from powerband.bench.report.lengths import length_distributions
from powerband.bench.report.results import Point, RunReport, failure_kind
from powerband.bench.report.table import (
    client_text,
    latency_rows,
    load_row,
    outcomes_text,
    server_text,
    subject,
    throughput_text,
    verdict_text,
)
from powerband.metrics.definitions import DEFINITIONS, PERCENTILES, PREAMBLE
from powerband.metrics.record import Outcome, percentile
from powerband.metrics.shown import (
    FIGURES,
    INVALID,
    OUTCOMES,
    digits,
    plain,
    share_interval_text,
    share_text,
    time_text,
)
from powerband.metrics.slo import slo_misses
from powerband.spec.quantities import count_text
from powerband.spec.slo import SLO

MAX_SCATTER_POINTS = 20_000  # points in the whole page
MAX_FAILURES = 1_000
MAX_BINS = 600
MAX_GAPS = 2_000_000  # of which the curve of ITL is drawn
SLOWEST = 20
MAX_CHUNKS = 120  # of one of the slowest requests
# Percentiles of the curves: even to the 99th, then closer.
GRID = (*(q / 2 for q in range(198)), *(99 + q / 20 for q in range(20)), 100.0)
_BIN_WIDTHS_S = [base * 10.0**power for power in range(-1, 6) for base in (1, 2, 5)]


def page_data(report: RunReport, loads: Sequence[LoadResult]) -> dict[str, Any]:
    """loads: of the report's points, in their order."""
    share = MAX_SCATTER_POINTS // max(len(report.points), 1)
    slo = report.slo
    return {
        "subject": subject(report),
        "headline": report.headline,
        "facts": _facts(report),
        "workload": report.workload,
        "slo": {"limits": slo.limits, "attainment": slo.attainment} if slo is not None else None,
        "grid": GRID,
        "names": FIGURES,
        "points": [_point(*point, share) for point in zip(report.points, loads, strict=True)],
        "definitions": {
            "before": PREAMBLE,
            "after": PERCENTILES,
            "rows": [(one.name, one.formula, one.note, one.elsewhere) for one in DEFINITIONS],
        },
    }


def thinned(points: Sequence[tuple[float, float]], max_points: int) -> list[tuple[float, float]]:
    """At most `max_points` of (time, value), by time: of each stretch its least, its greatest and two others."""
    ordered = sorted(points)
    if len(ordered) <= max_points:
        return ordered
    stretches = max(max_points // 4, 1)
    kept: list[tuple[float, float]] = []
    for number in range(stretches):
        stretch = ordered[number * len(ordered) // stretches : (number + 1) * len(ordered) // stretches]
        by_value = sorted(stretch, key=lambda point: point[1])
        kept += sorted({by_value[0], by_value[-1], stretch[0], stretch[len(stretch) // 2]})
    return kept


def _facts(report: RunReport) -> list[tuple[str, str]]:
    slo = report.slo
    left_out = f"the first {report.warm_up * 100:g} % and the last {report.cool_down * 100:g} % of arrivals"
    return [
        ("Server", f"{plain(report.target.base)}, {plain(report.server.kind)} {plain(report.server.version)}"),
        ("Model", plain(report.target.model)),
        ("Endpoint", report.target.endpoint),
        ("SLO", f"{slo} for {slo.attainment * 100:g} % of requests" if slo is not None else "none"),
        ("What counts", f"all but {left_out}"),
        ("Seed", str(report.seed)),
        ("Client", f"{plain(report.machine.processor)}, {report.machine.cpus} cores, {plain(report.machine.system)}"),
        ("Powerband", report.powerband),
        ("Started", report.started_at),
        ("Command", plain(shlex.join(report.command))),
    ]


def _point(point: Point, load: LoadResult, max_scatter: int) -> dict[str, Any]:
    summary, samples = point.summary, load.samples
    answered = [sample for sample in samples if sample.outcome is Outcome.OK and sample.scheduled_s in summary.window]
    names = FIGURES | OUTCOMES | INVALID
    return {
        "label": plain(point.label),
        "offered": {"kind": point.offered.kind, "value": point.offered.value, "text": str(point.offered)},
        "verdict": point.verdict,
        "sentence": verdict_text(point),
        "tiles": _tiles(point, samples),
        "load_row": load_row(point),
        "rows": latency_rows(point),
        "facts": [
            ("Throughput", throughput_text(point)),
            ("Requests", outcomes_text(point)),
            ("Client", client_text(point)),
            ("Server's own view", server_text(point) or "not reported"),
        ],
        "misses": [(names[name], count) for name, count in sorted(summary.misses.items(), key=lambda item: -item[1])],
        "failures": _failures(point, samples),
        "lengths": length_distributions(load),
        "attainment": summary.attainment,
        "attainment_interval": summary.attainment_interval,
        "goodput": summary.goodput,
        "output_tokens_per_s": summary.output_tokens_per_s,
        "percentiles": {name: _rounded(figure.percentiles.values()) for name, figure in summary.figures.items()},
        "window": (summary.window.start_s, summary.window.end_s),
        "quantiles": _quantiles(point, answered),
        "timeline": _timeline(samples),
        "scatter": _scatter(samples, summary.slo, max_scatter),
        "server": _server(point),
        "slowest": _slowest(answered, summary.slo),
    }


def _tiles(point: Point, samples: Sequence[Sample]) -> list[tuple[str, str, str]]:
    """(what, how much, a note) for the top of the page."""
    summary = point.summary
    tiles = []
    if summary.slo is not None:
        within = f"{share_interval_text(summary.attainment_interval)} at 95 %"
        tiles += [
            ("SLO kept", share_text(summary.attainment), within),
            ("Goodput", f"{digits(summary.goodput)}/s", f"of {digits(summary.request_rate)} requests/s"),
        ]
    for name in ("ttft", "tpot"):
        figure = summary.figures.get(name)
        if figure is not None:
            p99 = figure.percentiles[99.0]
            note = f"p99 {time_text(p99)}" if p99 is not None else f"{time_text(figure.maximum)} at most"
            tiles.append((f"{FIGURES[name]}, median", time_text(figure.percentiles[50.0]), note))
    if summary.valid_share is not None:
        tiles.append(("Valid", share_text(summary.valid_share), "of the answers have the form asked for"))
    of_all = f"of {count_text(summary.scheduled, 'request')}"
    in_flight = summary.outcomes.get(Outcome.ABORTED.value, 0)
    failed = summary.scheduled - in_flight - summary.outcomes.get(Outcome.OK.value, 0)
    tiles += [("Failed", f"{failed:,}", of_all)] if failed else []
    tiles += [("In flight when stopped", f"{in_flight:,}", of_all)] if in_flight else []
    prompts = f"{digits(summary.prompt_tokens_per_s)} of prompts"
    return [*tiles, ("Output tokens/s", digits(summary.output_tokens_per_s), prompts), _failed_tile(samples)]


def _failed_tile(samples: Sequence[Sample]) -> tuple[str, str, str]:
    """Of the whole run, by kind."""
    kinds = Counter(sample.outcome.value for sample in samples if sample.outcome is not Outcome.OK)
    by_kind = ", ".join(f"{count:,} {OUTCOMES[kind]}" for kind, count in kinds.most_common())
    return "Failed", f"{kinds.total():,}", f"{by_kind or 'none'}, of {count_text(len(samples), 'request')}"


def _failures(point: Point, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Of the whole run, by kind: what the client saw of it, how many had begun to be answered, and when it happened."""
    members: dict[object, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.outcome is not Outcome.OK:
            members[failure_kind(sample.outcome.value, sample.status, sample.error)].append(sample)
    found = []
    for group in point.errors:
        alike = members[failure_kind(group.outcome, group.status, group.message)]
        arrivals_s = [sample.scheduled_s for sample in alike]
        found.append(
            {
                "kind": OUTCOMES[group.outcome],
                "count": group.count,
                "status": group.status,
                "message": plain(group.message),
                "begun": sum(bool(sample.chunk_times_s) for sample in alike),
                "scheduled_s": [round(min(arrivals_s), 3), round(max(arrivals_s), 3)],
            }
        )
    return found


def _quantiles(point: Point, answered: Sequence[Sample]) -> dict[str, list[float | None]]:
    """Each figure's values at GRID."""
    records = [sample.record() for sample in answered]
    found = {}
    for name in ("ttft", "tpot", "stall", "e2e"):
        ordered = sorted(value for record in records if (value := getattr(record, f"{name}_s")) is not None)
        if ordered:
            found[name] = _rounded(percentile(ordered, q) for q in GRID)
    itl = point.summary.figures.get("itl")
    if itl is not None:
        found["itl"] = _rounded([*_itl_quantiles(answered)[:-1], itl.maximum])
    return found


def _itl_quantiles(answered: Sequence[Sample]) -> list[float]:
    """Of all gaps, or of every so many requests' where they are too many."""
    import numpy as np

    total = sum(len(sample.chunk_times_s) for sample in answered)
    chosen = answered[:: math.ceil(total / MAX_GAPS) or 1]
    gaps = [np.diff(np.asarray(sample.chunk_times_s)) for sample in chosen]
    tokens = np.concatenate([np.asarray(sample.chunk_tokens[1:], dtype=np.int64) for sample in chosen])
    pooled = np.repeat(np.concatenate(gaps) / tokens, tokens)
    return [float(value) for value in np.percentile(pooled, GRID)] if len(pooled) else [math.nan] * len(GRID)


def _timeline(samples: Sequence[Sample]) -> dict[str, Any]:
    """Bins of equal width over the whole run: arrivals and output tokens a second, requests in flight at each start."""
    import numpy as np

    times = np.fromiter(chain.from_iterable(sample.chunk_times_s for sample in samples), np.float64)
    tokens = np.fromiter(chain.from_iterable(sample.chunk_tokens for sample in samples), np.int64)
    scheduled = np.array([sample.scheduled_s for sample in samples])
    end_s = float(max(times.max(initial=0.0), scheduled.max(initial=0.0))) or 1.0
    min_bin_s = max(min(end_s / 60, 1.0), end_s / MAX_BINS)  # shorter ones show the chance of single arrivals only
    width_s = next((width for width in _BIN_WIDTHS_S if width >= min_bin_s), min_bin_s)
    bins = int(end_s / width_s) + 1
    edges = np.arange(bins) * width_s
    spans = [(sample.sent_s, sample.chunk_times_s[-1]) for sample in samples if sample.chunk_times_s]
    starts, ends = (np.sort([span[side] for span in spans]) for side in (0, 1))
    in_flight = np.searchsorted(starts, edges, side="right") - np.searchsorted(ends, edges, side="right")
    per_bin = np.bincount((times / width_s).astype(np.int64), weights=tokens, minlength=bins)
    arrivals = np.bincount((scheduled / width_s).astype(np.int64), minlength=bins)
    return {
        "width_s": width_s,
        "arrivals": _rounded((arrivals / width_s).tolist()),
        "tokens": _rounded((per_bin / width_s).tolist()),
        "in_flight": in_flight.tolist(),
    }


def _scatter(samples: Sequence[Sample], slo: SLO | None, max_points: int) -> dict[str, list[Any]]:
    """(scheduled, TTFT) of answered requests that kept the SLO and that missed it; times of those that failed."""
    kept: list[tuple[float, float]] = []
    over: list[tuple[float, float]] = []
    failed: list[float] = []
    for sample in samples:
        record = sample.record()
        if sample.outcome is Outcome.ABORTED:
            continue
        if sample.outcome is not Outcome.OK or record.ttft_s is None:
            failed.append(round(sample.scheduled_s, 3))
            continue
        is_over = slo is not None and bool(slo_misses(record, slo))
        (over if is_over else kept).append((round(sample.scheduled_s, 3), _short(record.ttft_s)))
    share = max_points * len(kept) // max(len(kept) + len(over), 1)
    failed.sort()
    return {
        "kept": thinned(kept, share),
        "missed": thinned(over, max_points - share),
        "failed": failed[:: math.ceil(len(failed) / MAX_FAILURES) or 1],
    }


def _server(point: Point) -> dict[str, Any] | None:
    """Its gauges over time."""
    server = point.server
    every = math.ceil(len(server.times_s) / MAX_BINS) or 1
    shown: dict[str, Any] = {
        name: server.values[name][::every] for name in ("running", "waiting", "kv_usage") if name in server.values
    }
    return {"times_s": [round(time_s, 2) for time_s in server.times_s[::every]], **shown} if shown else None


def _slowest(answered: Sequence[Sample], slo: SLO | None) -> list[dict[str, Any]]:
    """From scheduled to the last chunk, in seconds from scheduled."""
    done = sorted((s for s in answered if s.chunk_times_s), key=lambda s: s.scheduled_s - s.chunk_times_s[-1])
    return [
        {
            "index": sample.index,
            "scheduled_s": round(sample.scheduled_s, 3),
            "sent_s": _short(sample.sent_s - sample.scheduled_s),
            "chunks_s": [round(time_s - sample.scheduled_s, 4) for time_s in _chunks(sample.chunk_times_s)],
            "prompt_tokens": sample.prompt_tokens,
            "cached_tokens": sample.cached_tokens,
            "output_tokens": sample.output_tokens,
            "missed": [(FIGURES | INVALID)[name] for name in slo_misses(sample.record(), slo) or ()]
            if slo is not None
            else [],
        }
        for sample in done[:SLOWEST]
    ]


def _chunks(times_s: tuple[float, ...]) -> list[float]:
    """The first, the last, both sides of the longest gap, and evenly chosen others."""
    every = math.ceil(len(times_s) / MAX_CHUNKS)
    max_gap = max(pairwise(times_s), key=lambda pair: pair[1] - pair[0], default=times_s[:1])
    return sorted({*times_s[::every], times_s[-1], *max_gap})


def _rounded(values: Iterable[float | None]) -> list[float | None]:
    return [None if value is None or math.isnan(value) else _short(value) for value in values]


def _short(value: float) -> float:
    """Four digits that count."""
    return float(f"{value:.4g}")
