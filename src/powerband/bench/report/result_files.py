"""A run as files: run.json holds the RunReport, requests.jsonl every request, one a line.

run.json holds figures as numbers with their units in their names; beside them, where the definition is truly the same,
what other tools call them (`aliases`). requests.jsonl can be replayed: it is the "records" format of spec.traces. Its
times are rounded to microseconds.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from powerband.bench.client.messages import Sample
from powerband.bench.load import LoadResult
from powerband.bench.report.other_tools import aliases
from powerband.bench.report.results import SCHEMA, RunReport
from powerband.errors import EnvironmentFault, UsageError
from powerband.metrics.figures import PERCENTILES
from powerband.spec.workload.schedule import PlannedRequest, Schedule

RUN_FILE, REQUESTS_FILE = "run.json", "requests.jsonl"
_DIGITS = 6  # of a second
# Far above what a run leaves: a point takes some 10 kB of run.json, a request some 10 bytes per chunk beside its text.
_MAX_RUN_BYTES = 64 << 20
_MAX_LINE_BYTES = 64 << 20
_MAX_REQUESTS_BYTES = 8 << 30
_BOUNDS = {"min_s": "minimum", "max_s": "maximum"}


class PromptSegment(msgspec.Struct, frozen=True, omit_defaults=True):
    """As spec.workload.Segment. text: where it was recorded."""

    key: str
    tokens: int
    text: str | None = None


class RequestLine(Sample, frozen=True, kw_only=True, omit_defaults=False):
    """A line of requests.jsonl. point: index of the run's point. conversation: requests with the same number wait for
    each other's answers and share what was said; None: it stands alone.
    """

    point: int
    segments: tuple[PromptSegment, ...]
    conversation: int | None


_LINES = msgspec.json.Decoder(RequestLine)


def write_run(report: RunReport, loads: Sequence[LoadResult], folder: Path) -> None:
    """Both files, the folder made where there is none. loads: of the report's points, in their order.

    Raises EnvironmentFault when they cannot be written.
    """
    encoder = msgspec.json.Encoder()
    whole = msgspec.json.format(encoder.encode(run_as_dict(report)), indent=1) + b"\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / REQUESTS_FILE).open("wb") as file:
            for point, load in enumerate(loads):
                for line in _lines(point, load):
                    file.write(encoder.encode(line) + b"\n")
        (folder / RUN_FILE).write_bytes(whole)
    except OSError as problem:
        raise EnvironmentFault(
            f"Cannot write the results to {folder}: {problem.strerror}.", hint="Name another folder.", param="out"
        ) from None


def read_run(folder: Path) -> RunReport:
    """Raises UsageError for what is no run, or one of another schema."""
    path = folder / RUN_FILE
    try:
        with _open(path, _MAX_RUN_BYTES) as file:
            values = msgspec.json.decode(file.read(_MAX_RUN_BYTES), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as problem:
        raise _broken(path, str(problem)) from None
    schema = values.get("schema")
    if schema != SCHEMA:
        raise UsageError(
            f"{path} has the schema {schema!r}; this version reads {SCHEMA!r}.",
            hint="Read it with the version of Powerband that wrote it (its field 'powerband'), or measure again.",
            code="unknown_schema",
        )
    try:
        return run_from_dict(values)
    except (msgspec.MsgspecError, UsageError, KeyError, TypeError, AttributeError) as problem:
        raise _broken(path, f"{problem} is missing" if isinstance(problem, KeyError) else str(problem)) from None


def read_requests(folder: Path, num_points: int) -> list[list[RequestLine]]:
    """The requests of each of the run's points. Raises UsageError for what is no such file."""
    path = folder / REQUESTS_FILE
    points: list[list[RequestLine]] = [[] for _ in range(num_points)]
    with _open(path, _MAX_REQUESTS_BYTES) as file:
        for number, line in enumerate(_lines_of(file, path), 1):
            try:
                request = _LINES.decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as problem:
                raise _broken(path, f"line {number}: {problem}") from None
            if not 0 <= request.point < num_points:
                raise _broken(path, f"line {number}: there is no point {request.point} among the run's {num_points}")
            points[request.point].append(request)
    return points


def run_as_dict(report: RunReport) -> dict[str, Any]:
    """For JSON. Besides the report's own fields, what follows from them: verdicts and aliases."""
    values: dict[str, Any] = {"schema": report.schema, **msgspec.to_builtins(report, str_keys=True)}
    values["headline"] = report.headline
    values["slo"] = report.slo and report.slo.as_dict()
    for written, point in zip(values["points"], report.points, strict=True):
        figures = written["summary"]["figures"]
        written["summary"]["figures"] = {f"{name}_s": _figure_as_dict(figure) for name, figure in figures.items()}
        written["summary"]["slo"] = point.summary.slo and point.summary.slo.as_dict()
        written["verdict"] = point.verdict
        written["aliases"] = aliases(point)
    return values


def run_from_dict(values: dict[str, Any]) -> RunReport:
    """The inverse. Raises msgspec.ValidationError, KeyError, TypeError, AttributeError or UsageError."""
    for point in values["points"]:
        summary = point["summary"]
        summary["figures"] = {
            name.removesuffix("_s"): _figure_from_dict(figure) for name, figure in summary["figures"].items()
        }
        if "most_lag_s" in summary:  # as version 0.1.0 wrote it
            summary["max_lag_s"] = summary.pop("most_lag_s")
    return msgspec.convert(values, RunReport)


def _figure_as_dict(figure: dict[str, Any]) -> dict[str, Any]:
    """{'count', 'mean_s', 'min_s', 'max_s', 'p50_s', 'p50_interval_s', …}: seconds."""
    made = {"count": figure["count"], "mean_s": figure["mean"]}
    made |= {name: figure[ours] for name, ours in _BOUNDS.items()}
    for q in PERCENTILES:
        made[f"p{q:g}_s"] = figure["percentiles"].get(str(q))
        made[f"p{q:g}_interval_s"] = figure["intervals"].get(str(q))
    return made


def _figure_from_dict(written: dict[str, Any]) -> dict[str, Any]:
    return {
        "count": written["count"],
        "mean": written["mean_s"],
        **{ours: written[name] for name, ours in _BOUNDS.items()},
        "percentiles": {q: written[f"p{q:g}_s"] for q in PERCENTILES},
        "intervals": {q: written[f"p{q:g}_interval_s"] for q in PERCENTILES},
    }


def _lines(point: int, load: LoadResult) -> Iterator[RequestLine]:
    planned = {request.index: request for chain in load.schedule.chains for request in chain.requests}
    talks = _conversations(load.schedule)
    for sample in load.samples:
        request = planned[sample.index]
        first = request.index - request.turn
        values = msgspec.structs.asdict(sample) | {
            "scheduled_s": round(sample.scheduled_s, _DIGITS),
            "sent_s": round(sample.sent_s, _DIGITS),
            "chunk_times_s": tuple([round(time_s, _DIGITS) for time_s in sample.chunk_times_s]),
        }
        yield RequestLine(
            **values,
            point=point,
            segments=tuple(PromptSegment(**asdict(segment)) for segment in request.segments),
            conversation=first if first in talks else None,
        )


def _conversations(schedule: Schedule) -> set[int]:
    """Of several turns, each by the index of its first request: turns follow each other by index."""
    requests: Iterator[PlannedRequest] = (request for chain in schedule.chains for request in chain.requests)
    return {request.index - request.turn for request in requests if request.turn}


def _open(path: Path, max_bytes: int) -> BinaryIO:
    """Only regular files: others may never end, or wait for a writer."""
    hint = "Name the folder that 'powerband bench --out' wrote."
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{path} is not a regular file.", hint=hint)
        if status.st_size > max_bytes:
            raise UsageError(f"{path} has {status.st_size:,} bytes; {max_bytes:,} are read at most.", hint=hint)
        return path.open("rb")
    except OSError as problem:
        raise UsageError(f"Cannot read {path}: {problem.strerror}.", hint=hint) from None


def _lines_of(file: BinaryIO, path: Path) -> Iterator[bytes]:
    while line := file.readline(_MAX_LINE_BYTES + 1):
        if len(line) > _MAX_LINE_BYTES:
            raise _broken(path, f"it has a line of more than {_MAX_LINE_BYTES:,} bytes")
        yield line


def _broken(path: Path, why: str) -> UsageError:
    return UsageError(f"{path} is broken: {why}.", hint="Measure again.", code="broken_run")


@contextlib.contextmanager
def results_folder(folder: Path) -> Iterator[None]:
    """Make it before the load, not after it, and remove it if the run leaves nothing. Raises EnvironmentFault."""
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as problem:
        why = "it is a file, not a folder" if folder.is_file() else problem.strerror
        hint = "--out FOLDER names another place."
        raise EnvironmentFault(f"Cannot write results to {folder}: {why}.", hint=hint, param="out") from None
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if is_new:
                folder.rmdir()
        raise
