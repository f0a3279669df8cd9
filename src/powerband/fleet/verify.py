"""Verification of a plan's guarantee: load the service with the plan's workload, and compare measured with promised."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from powerband.bench.client.answer_forms import asking_for, form_of
from powerband.bench.client.messages import ServerAddress
from powerband.bench.load import Live, LoadOptions, LoadResult
from powerband.bench.report.html_report import write_report
from powerband.bench.report.results import RunReport
from powerband.bench.session import BenchSession, Experiment
from powerband.calibration.client_capacity import known_client_capacity
from powerband.http_client.request import bearer
from powerband.metrics.figures import Summary
from powerband.metrics.record import Outcome, percentile
from powerband.metrics.shown import NONE, digits, share_text, time_text
from powerband.spec.plan import Plan, Prediction
from powerband.spec.workload.arrivals import OpenLoop
from powerband.spec.workload.workload import Workload

# unclear: missed, but by so few requests that it may be chance.
FigureVerdict = Literal["kept", "broken", "unclear", ""]
RunVerdict = Literal["kept", "broken", "unclear", "invalid"]
_MIN_OUTPUT_RATIO = 0.97  # of the requested tokens, if the drawn requests ask for fewer than promised
_MIN_SENT_RATIO, _MAX_SEEDS = 0.9, 50  # of the promised requests; of schedules that are drawn for so many
_WINDOW_MARGIN = 1.4  # the begin and the end of a run do not count, and arrivals are random
_MIN_BAND_REQUESTS = 20  # with fewer, a percentile lies anywhere
_LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "stall": "stall", "e2e": "E2E"}


@dataclass(frozen=True, slots=True)
class CheckedFigure:
    """One line of the comparison, as texts."""

    name: str
    promised: str
    predicted: str
    measured: str
    verdict: FigureVerdict
    outside: Literal["above", "below", ""] = ""  # the predicted band


@dataclass(frozen=True, slots=True)
class Verification:
    lines: tuple[CheckedFigure, ...]
    verdict: RunVerdict
    fault: str  # why the run is not valid evidence; '': it is
    requests: int
    min_requests: int  # with fewer, chance may keep the promise although too few requests meet the SLO
    min_seconds: float  # of a verification with so many
    errors: int
    seconds: float
    report: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(
    plan: Plan,
    url: str,
    *,
    model: str,
    api_key: str,
    seconds: float,
    report: Path | None = None,
    on_progress: Callable[[Live], object] | None = None,
) -> Verification:
    """Run the load for `seconds`, with tools or a schema where the workload has them.

    Raises EnvironmentFault if the service does not respond at all.
    """
    capacity = known_client_capacity()
    workload = replace(plan.workload, arrivals=plan.arrivals)
    experiment = Experiment(
        target=asking_for(
            form_of(plan.workload),
            ServerAddress(base=url, endpoint="completions", model=model, headers=bearer(api_key)),
        ),
        workload=workload,
        duration_s=seconds,
        seed=full_load_seed(workload, plan.promise.rate, seconds),
        slo=plan.slo,
        options=LoadOptions(timeout_s=600.0),
        ceiling_chunks_per_s=capacity.chunks_per_s if capacity is not None else None,
    )
    session = BenchSession(experiment, command=("powerband", "deploy"), watch=on_progress)
    found = asyncio.run(_run(session))
    if report is not None:
        write_report(found, session.loads, report)
    return check_report(plan, found, session.loads[0], str(report or ""))


def full_load_seed(workload: Workload, rate: float, seconds: float) -> int:
    """Of the first schedule that has the promised requests: at a low rate, one may have few of them by chance."""
    if not isinstance(workload.arrivals, OpenLoop):
        return 0
    wanted = _MIN_SENT_RATIO * rate * seconds
    drawn = (workload.draw(seed, duration_s=seconds).num_requests for seed in range(_MAX_SEEDS))
    return next((seed for seed, number in enumerate(drawn) if number >= wanted), 0)


async def _run(session: BenchSession) -> RunReport:
    await session.open(10.0)
    return await session.single()


def check_report(plan: Plan, report: RunReport, load: LoadResult, report_path: str = "") -> Verification:
    """Compare a run at the promised rate with the plan."""
    point = report.points[0]
    summary = point.summary
    attainment = _attainment(plan, summary, is_saturated=point.saturated)
    lines = [attainment, *_latencies(plan, summary, load), *_rates(plan, summary, load)]
    if summary.scheduled < _MIN_BAND_REQUESTS:
        lines = [replace(line, outside="") for line in lines]
    verdicts = {line.verdict for line in lines}
    verdict: RunVerdict = "kept"
    if point.client.fault:
        verdict = "invalid"
    elif "broken" in verdicts:
        verdict = "broken"
    elif "unclear" in verdicts:
        verdict = "unclear"
    min_requests = _min_requests(plan.slo.attainment)
    errors = sum(group.count for group in point.errors)
    return Verification(
        lines=tuple(lines),
        verdict=verdict,
        fault=point.client.fault,
        requests=summary.scheduled,
        min_requests=min_requests,
        min_seconds=math.ceil(_WINDOW_MARGIN * min_requests / plan.promise.rate),
        errors=errors,
        seconds=summary.window.seconds,
        report=report_path,
    )


def _min_requests(attainment: float) -> int:
    """Number of requests that, all within the SLO, show the attainment: Wilson's 95 % interval begins above it."""
    return 1 if attainment >= 1 else math.ceil(1.96**2 * attainment / (1 - attainment))


def _attainment(plan: Plan, summary: Summary, *, is_saturated: bool) -> CheckedFigure:
    promised, measured = plan.slo.attainment, summary.attainment or 0.0
    verdict: FigureVerdict = "kept"
    if is_saturated:
        verdict = "broken"
    elif measured < promised:
        interval = summary.attainment_interval
        verdict = "unclear" if interval is not None and interval[1] >= promised else "broken"
    text = share_text(measured)
    if summary.attainment_interval is not None:
        low, high = summary.attainment_interval
        text += f" ({share_text(low).removesuffix(' %')}–{share_text(high)})"
    if is_saturated:
        text += ", and the queue grew to the end"
    return CheckedFigure(
        "SLO attainment",
        f"≥ {promised * 100:g} %",
        _band(plan.predicted.get("attainment"), share_text),
        text,
        verdict,
        _outside(plan.predicted.get("attainment"), measured),
    )


def _latencies(plan: Plan, summary: Summary, load: LoadResult) -> list[CheckedFigure]:
    """One line per limit, at the SLO's percentile. Whether all are met together is decided by the attainment."""
    q = plan.slo.attainment * 100
    records = [sample.record() for sample in load.samples]
    answered = [r for r in records if r.scheduled_s in summary.window and r.outcome is Outcome.OK]
    found = []
    for name, limit in plan.slo.limits.items():
        values = [value for record in answered if (value := getattr(record, f"{name}_s")) is not None]
        measured = percentile(values, q) if values else math.nan
        verdict: FigureVerdict = (
            "kept" if measured <= limit else "unclear" if _may_be_chance(summary, plan) else "broken"
        )
        found.append(
            CheckedFigure(
                f"{_LATENCIES[name]} p{q:g}",
                f"≤ {time_text(limit)}",
                _band(plan.predicted.get(f"{name}_s"), time_text),
                NONE if math.isnan(measured) else time_text(measured),
                verdict,
                _outside(plan.predicted.get(f"{name}_s"), measured),
            )
        )
    return found


def _may_be_chance(summary: Summary, plan: Plan) -> bool:
    interval = summary.attainment_interval
    return interval is not None and interval[1] >= plan.slo.attainment


def _rates(plan: Plan, summary: Summary, load: LoadResult) -> list[CheckedFigure]:
    answered = summary.outcomes.get(Outcome.OK.value, 0)
    share = answered / summary.scheduled if summary.scheduled else 0.0
    lines = [
        CheckedFigure(
            "requests/s",
            digits(plan.promise.rate),
            "",
            f"{digits(summary.request_rate)} sent, {share_text(share)} answered",
            "",
        )
    ]
    if summary.valid_share is not None:  # an invalid answer misses the SLO
        lines.append(CheckedFigure("valid answers", "", "", share_text(summary.valid_share), ""))
    promised = plan.promise.output_tokens_per_s
    if promised is not None:
        reached = summary.output_tokens_per_s
        asked = _asked_per_s(summary, load)
        verdict: FigureVerdict = "kept" if reached >= min(promised, _MIN_OUTPUT_RATIO * asked) else "broken"
        if summary.valid_share is not None:
            verdict = ""  # answers that have a form end by themselves: the model decides how long they are
        text = digits(reached) + (f" of {digits(asked)} asked for" if reached < promised else "")
        figure = plan.predicted.get("output_tokens_per_s")
        outside = _outside(figure, reached)
        lines.append(
            CheckedFigure("output tokens/s", f"≥ {digits(promised)}", _band(figure, digits), text, verdict, outside)
        )
    return lines


def _asked_per_s(summary: Summary, load: LoadResult) -> float:
    """Output tokens that the sampled requests asked for, which may differ from the mean by chance."""
    within = [sample for sample in load.samples if sample.record().scheduled_s in summary.window]
    seconds = summary.window.seconds
    return sum(sample.asked_tokens for sample in within) / seconds if seconds > 0 else 0.0


def _outside(figure: Prediction | None, measured: float) -> Literal["above", "below", ""]:
    if figure is None or math.isnan(measured) or figure.low <= measured <= figure.high:
        return ""
    return "above" if measured > figure.high else "below"


def _band(figure: Prediction | None, text: Callable[[float], str]) -> str:
    if figure is None:
        return ""
    value, low, high = text(figure.value), text(figure.low), text(figure.high)
    return value if low == high == value else f"{value} ({low}–{high})"
