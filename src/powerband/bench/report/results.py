"""What comes out of `powerband bench`: a RunReport of one or more points, each one load with its figures.

LoadResult ── point_of ──► Point ─┐
where, what, when, with what      ├─► RunReport ──► run.json, table, report.html, comparison
                                  ┘
"""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Literal

from powerband.bench.client.messages import CLIENT_LIMITS, Endpoint, Sample, ServerAddress
from powerband.bench.client.probe import ServerInfo
from powerband.bench.load import LoadResult, steady_window
from powerband.bench.server_metrics import ServerMetrics
from powerband.metrics.figures import Summary, summarize
from powerband.metrics.record import Outcome
from powerband.metrics.statistics import Interval
from powerband.spec.hardware.device import detect_cpu
from powerband.spec.quantities import count_text
from powerband.spec.slo import SLO
from powerband.spec.workload.arrivals import Arrivals, ClosedLoop, OpenLoop
from powerband.spec.workload.schedule import LengthCut, Schedule

SCHEMA = "powerband.bench/1"
# A client that is busier than this share of what it was calibrated to bear delays what it measures.
MAX_CAPACITY_RATIO = 0.7
MAX_ERROR_GROUPS = 20
# Options whose values are redacted from reports.
SECRET_OPTIONS = ("--api-key", "--header")
HIDDEN = "(hidden)"

Verdict = Literal["PASS", "MISSED", "INVALID", "MEASURED"]


@dataclass(frozen=True, slots=True)
class OfferedLoad:
    """The load asked for: requests a second (the mean, where it changes), or users of a closed loop."""

    kind: Literal["rate", "concurrency"]
    value: float

    @classmethod
    def of(cls, arrivals: Arrivals, schedule: Schedule) -> OfferedLoad:
        if isinstance(arrivals, ClosedLoop):
            return cls("concurrency", arrivals.concurrency)
        if isinstance(arrivals, OpenLoop) and len({rate for p in arrivals.phases for rate in (p.start, p.end)}) == 1:
            return cls("rate", arrivals.phases[0].start)
        last_s = schedule.chains[-1].start_s
        return cls("rate", len(schedule.chains) / last_s if last_s > 0 else 0.0)

    def __str__(self) -> str:
        return f"{self.value:.4g} requests/s" if self.kind == "rate" else f"{self.value:.0f} users"


@dataclass(frozen=True, slots=True)
class Throughput:
    """Of a whole run, from its start to its last token: with warm-up and the time in which nothing arrives any more.
    Successful requests only, as other tools count.
    """

    seconds: float
    answered: int
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class ClientFigures:
    """How busy the load generator's busiest process was; the figure send_lag shows how late it sent."""

    core_share: float
    chunks_per_s: float
    ceiling_chunks_per_s: float | None  # capacity of a process on this machine; None: not calibrated
    fault: str  # why the point does not measure the server, or ''

    @property
    def ceiling_share(self) -> float | None:
        return self.chunks_per_s / self.ceiling_chunks_per_s if self.ceiling_chunks_per_s else None


@dataclass(frozen=True, slots=True)
class ErrorGroup:
    """Requests that failed alike."""

    outcome: str
    status: int
    message: str  # of one of them; numbers in the others may differ
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One load."""

    label: str
    offered: OfferedLoad
    seed: int
    schedule_digest: str
    summary: Summary  # of its window; the other figures are of the whole run
    whole: Throughput
    client: ClientFigures
    server: ServerMetrics
    errors: tuple[ErrorGroup, ...]
    short_answers: int  # successful requests with fewer output tokens than requested
    uncounted: int  # requests whose tokens the server did not count, so that chunks were counted
    unsent: int  # requests that were not due before the end
    wall_s: float
    saturated: bool  # the queue grew until the end
    stopped: bool  # early, by decision
    cut: LengthCut | None = None  # requests that were cut to fit the context; None: none
    interrupted: bool = False  # by the user
    in_flight: int = 0  # when the load was stopped early: these requests have no final latencies

    @property
    def verdict(self) -> Verdict:
        """MEASURED: there is no SLO to keep."""
        summary = self.summary
        if self.client.fault:
            return "INVALID"
        if summary.slo is None or summary.attainment is None:
            return "MEASURED"
        is_kept = summary.attainment >= summary.slo.attainment and not self.saturated and not self.stopped
        return "PASS" if is_kept else "MISSED"


@dataclass(frozen=True, slots=True)
class FoundRate:
    """The result of a search for the highest rate."""

    requests_per_s: float  # 0: none meets the SLO
    # From the highest rate that certainly meets the SLO to the lowest that does not; None: no trial was that high.
    interval: tuple[float, float | None]
    attainment: float
    attainment_interval: Interval


@dataclass(frozen=True, slots=True)
class ClientMachine:
    """Where the client ran."""

    processor: str
    cpus: int
    system: str  # operating system and release, without the computer's name

    @classmethod
    def here(cls) -> ClientMachine:
        cpu = detect_cpu()
        system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
        return cls(cpu.name, cpu.cores, system)


@dataclass(frozen=True, slots=True)
class ReportedAddress:
    """The part of a ServerAddress that is reported: no headers, no key."""

    base: str
    endpoint: Endpoint
    model: str

    @classmethod
    def of(cls, target: ServerAddress) -> ReportedAddress:
        return cls(target.base, target.endpoint, target.model)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """One call of `powerband bench`."""

    started_at: str  # UTC, ISO 8601
    command: tuple[str, ...]  # without secrets, see `without_secrets`
    powerband: str  # version
    machine: ClientMachine
    target: ReportedAddress
    server: ServerInfo
    workload: dict[str, Any]  # see Workload.as_dict
    slo: SLO | None
    seed: int
    warm_up: float  # fractions, see load.steady_window
    cool_down: float
    points: tuple[Point, ...]
    found: FoundRate | None = None
    interrupted: bool = False  # by the user: what was measured until then
    schema: str = field(default=SCHEMA)

    @property
    def headline(self) -> str:
        """What a search found, or that the run is not complete; '' for other runs."""
        if self.interrupted:
            in_flight = sum(point.in_flight for point in self.points)
            left = f" {count_text(in_flight, 'request')} had not ended." if in_flight else ""
            return f"Interrupted: this is what was measured until then.{left}"
        if self.found is None:
            return ""
        if not self.found.requests_per_s:
            return "No rate that was tried keeps the SLO."
        low, high = self.found.interval
        beyond = "" if high is None else f", certainly missed from {high:.3g} on"
        return (
            f"{self.found.requests_per_s:.3g} requests/s is the highest rate that keeps the SLO "
            f"(certainly kept up to {low:.3g}{beyond}; 95 % each)."
        )


def build_point(
    result: LoadResult,
    *,
    label: str,
    offered: OfferedLoad,
    warm_up: float,
    cool_down: float,
    slo: SLO | None,
    ceiling_chunks_per_s: float | None = None,
    saturated: bool = False,
) -> Point:
    """The figures of one load. warm_up, cool_down: shares, see load.window_of."""
    window = steady_window(result.samples, warm_up, cool_down)
    summary = summarize([sample.record() for sample in result.samples], window, slo)
    answered = [sample for sample in result.samples if sample.outcome is Outcome.OK]
    return Point(
        label=label,
        offered=offered,
        seed=result.schedule.seed,
        schedule_digest=result.schedule.digest(),
        summary=summary,
        whole=_whole_run(answered),
        client=_client(result, summary, ceiling_chunks_per_s),
        server=result.server,
        errors=error_groups(result.samples),
        short_answers=sum(one.output_tokens < one.asked_tokens and one.is_valid is None for one in answered),
        uncounted=sum(sample.counted_by == "chunks" for sample in answered),
        unsent=result.unsent,
        wall_s=result.wall_s,
        saturated=saturated,
        stopped=result.stopped,
        cut=result.schedule.cut,
        interrupted=result.interrupted,
        in_flight=sum(sample.outcome is Outcome.ABORTED for sample in result.samples),
    )


def error_groups(samples: Sequence[Sample]) -> tuple[ErrorGroup, ...]:
    """Failures by outcome, status and message with its numbers left out, the most frequent first."""
    counts: Counter[tuple[str, int, str]] = Counter()
    examples: dict[tuple[str, int, str], str] = {}
    for sample in samples:
        if sample.outcome not in (Outcome.OK, Outcome.ABORTED):
            key = failure_kind(sample.outcome.value, sample.status, sample.error)
            counts[key] += 1
            examples.setdefault(key, sample.error)
    common = counts.most_common(MAX_ERROR_GROUPS)
    return tuple(ErrorGroup(key[0], key[1], examples[key], count) for key, count in common)


def failure_kind(outcome: str, status: int, message: str) -> tuple[str, int, str]:
    """What failures that are alike have in common: the message without its numbers."""
    return outcome, status, re.sub(r"\d+", "#", message)


def without_secrets(arguments: Sequence[str]) -> tuple[str, ...]:
    """A command line whose keys and headers are hidden, in either spelling: `--api-key K`, `--api-key=K`."""
    shown: list[str] = []
    is_secret = False
    for argument in arguments:
        name, sign, _ = argument.partition("=")
        if is_secret:
            shown.append(HIDDEN)
        else:
            shown.append(f"{name}={HIDDEN}" if sign and name in SECRET_OPTIONS else argument)
        is_secret = not is_secret and argument in SECRET_OPTIONS
    return tuple(shown)


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def powerband_version() -> str:
    return version("powerband")


def _whole_run(answered: Sequence[Sample]) -> Throughput:
    seconds = max((sample.chunk_times_s[-1] for sample in answered if sample.chunk_times_s), default=0.0)
    per_s = 1 / seconds if seconds > 0 else 0.0
    return Throughput(
        seconds,
        len(answered),
        len(answered) * per_s,
        sum(sample.prompt_tokens for sample in answered) * per_s,
        sum(sample.output_tokens for sample in answered) * per_s,
    )


def _client(result: LoadResult, summary: Summary, ceiling_chunks_per_s: float | None) -> ClientFigures:
    fault = summary.client_fault
    limited = Counter(sample.error for sample in result.samples if sample.error in CLIENT_LIMITS)
    for limit, count in limited.most_common(1):
        verb = "was" if count == 1 else "were"
        fault = f"{count} of {count_text(len(result.samples), 'request')} {verb} not sent: {limit}"
    if result.interrupted:
        in_flight = sum(sample.outcome is Outcome.ABORTED for sample in result.samples)
        fault = (
            f"the load was interrupted after {result.wall_s:.0f} s with {in_flight:,} of "
            f"{count_text(len(result.samples), 'request')} in flight"
        )
    if not fault and not summary.scheduled:
        fault = "no request was scheduled in the part that counts"
    if not fault and ceiling_chunks_per_s and result.chunks_per_s > MAX_CAPACITY_RATIO * ceiling_chunks_per_s:
        share = result.chunks_per_s / ceiling_chunks_per_s
        fault = f"the client received {share:.0%} of the chunks it can bear (at most {MAX_CAPACITY_RATIO:.0%} may be)"
    return ClientFigures(result.client_share, result.chunks_per_s, ceiling_chunks_per_s, fault)
