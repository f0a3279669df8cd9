"""`powerband bench`: load a server, judge it, and leave a report."""

from __future__ import annotations

import contextlib
import json as json_format
import os
import sys
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from powerband.cli.bench.options import RequestOptions, SLOFlags, TargetFlags
from powerband.cli.bench.other_tools import OtherToolsFlags, translated, url_of
from powerband.cli.flags import Json
from powerband.cli.load_options import ArrivalOptions
from powerband.cli.tables import print_table
from powerband.errors import UsageError
from powerband.spec.quantities import number, seconds
from powerband.spec.workload.options import requested_load

if TYPE_CHECKING:
    from powerband.bench.client.messages import ServerAddress
    from powerband.bench.report.results import Point, RunReport
    from powerband.bench.session import BenchSession, Experiment
    from powerband.fault_injection.faults import FaultResult
    from powerband.spec.plan import Plan
    from powerband.spec.workload.workload import Workload

DEFAULT_URL = "http://localhost:8000"
MISSED, INVALID, NO_ANSWER = 1, 3, 4
_MODES = Group("What to do", sort_key=0)
_OUTPUT = Group("Output", sort_key=5)


def _mode(help: str) -> Parameter:
    return Parameter(help=help, negative="", group=_MODES, show_default=False)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class BenchModeFlags:
    sweep: Annotated[bool, _mode("Rates from light to beyond saturation, one after the other")] = False
    rates: Annotated[str | None, _mode("... these rates, e.g. 1,2,4,8")] = None
    find_rate: Annotated[bool, _mode("Find the highest rate that meets the --slo")] = False
    plan: Annotated[Path | None, _mode("Verify a plan's promise; exit 1 if it is broken")] = None
    compare: Annotated[
        list[Path] | None,
        Parameter(
            help="Compare the results in two or more folders with the first; sends no load",
            negative="",
            group=_MODES,
            show_default=False,
            consume_multiple=True,
        ),
    ] = None
    calibrate: Annotated[bool, _mode("Measure the capacity of this client; sends no load")] = False
    fault: Annotated[str | None, _mode("Inject client faults; 'list' shows the kinds; loopback only")] = None
    allow_remote: Annotated[bool, _mode("... also against other machines")] = False
    explain_metrics: Annotated[bool, _mode("Print the definition of every figure")] = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    out: Annotated[
        Path | None,
        Parameter(
            name=("--out", "--result-dir", "--output-dir"),
            help="Folder for the results; default: a new one in bench-runs/",
            group=_OUTPUT,
        ),
    ] = None
    json: Annotated[Json, Parameter(group=_OUTPUT)] = False


def bench(
    url: Annotated[str | None, Parameter(help=f"The server; default: {DEFAULT_URL}")] = None,
    /,
    *,
    modes: BenchModeFlags | None = None,
    load: ArrivalOptions | None = None,
    requests: RequestOptions | None = None,
    server: TargetFlags | None = None,
    judging: SLOFlags | None = None,
    output: OutputFlags | None = None,
    other: OtherToolsFlags | None = None,
) -> int:
    """Send load to an OpenAI-compatible server and measure it.

    Without options: the chat workload at one request a second for a minute.
    Writes run.json, requests.jsonl and report.html.
    Exits with 1 if the SLO or a plan's promise is missed, 3 if the client could
    not sustain the load (INVALID), 4 if no request was answered.
    """
    modes, output = modes or BenchModeFlags(), output or OutputFlags()
    is_load = not (modes.explain_metrics or modes.compare is not None or modes.calibrate)
    if not is_load and any(given is not None for given in (url, load, requests, server, judging, other)):
        raise UsageError("This sends no load: the server and its options have no effect.", hint="Leave them out.")
    _check_modes(modes)
    if modes.explain_metrics:
        from powerband.metrics.definitions import explained

        print(explained())
        return 0
    if modes.compare is not None:
        return _compare(modes.compare, output)
    if modes.calibrate:
        return _calibrate(as_json=output.json)
    other, server = other or OtherToolsFlags(), server or TargetFlags()
    load, requests, judging, is_sweep = translated(
        other, load or ArrivalOptions(), requests or RequestOptions(), judging or SLOFlags()
    )
    modes = replace(modes, sweep=modes.sweep or is_sweep)
    _check_modes(modes)
    target = _target(url_of(url, other) or DEFAULT_URL, requests, server)
    if modes.fault is not None:
        return _fault(modes, target, load, as_json=output.json)
    return _run(modes, output, target, load, requests, server, judging)


def _check_modes(modes: BenchModeFlags) -> None:
    """Raises UsageError for two at once."""
    chosen = {
        "--sweep": modes.sweep or modes.rates is not None,
        "--find-rate": modes.find_rate,
        "--plan": modes.plan is not None,
        "--compare": modes.compare is not None,
        "--calibrate": modes.calibrate,
        "--fault": modes.fault is not None,
        "--explain-metrics": modes.explain_metrics,
    }
    given = [name for name, is_chosen in chosen.items() if is_chosen]
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} are two different things.", hint="Give one of them.")
    if modes.allow_remote and modes.fault is None:
        raise UsageError("--allow-remote is for --fault.", param="allow_remote")


def _run(
    modes: BenchModeFlags,
    output: OutputFlags,
    target: ServerAddress,
    load: ArrivalOptions,
    requests: RequestOptions,
    server: TargetFlags,
    judging: SLOFlags,
) -> int:
    """Load, report, and say by the exit code how it went."""
    import asyncio

    from rich.console import Console

    from powerband.bench.report.html_report import write_report
    from powerband.bench.report.live import LiveView
    from powerband.bench.report.result_files import results_folder, run_as_dict, write_run
    from powerband.bench.report.results import without_secrets
    from powerband.bench.report.table import run_table
    from powerband.bench.session import BenchSession

    plan = _plan(modes.plan, load, requests, judging) if modes.plan is not None else None
    experiment = _experiment(modes, plan, target, load, requests, server, judging)
    folder = output.out or Path("bench-runs", datetime.now().strftime("%Y%m%d-%H%M%S"))
    view = LiveView(experiment.slo, label=experiment.workload.name)
    several = modes.sweep or modes.rates is not None or modes.find_rate
    with results_folder(folder), view:
        session = BenchSession(
            experiment,
            command=without_secrets(["powerband", *sys.argv[1:]]),
            watch=view,
            on_point=_print_point if several else None,
            on_note=lambda sentence: print(f"· {sentence}", file=sys.stderr),
        )
        report, received = asyncio.run(_drive(session, modes, load, seconds(server.wait, param="wait")))
    if received and not report.points:
        raise KeyboardInterrupt
    write_run(report, session.loads, folder)
    page = folder / "report.html"
    write_report(report, session.loads, page)
    if output.json:
        print(json_format.dumps(run_as_dict(report), indent=1))
    else:
        Console().print(run_table(report))
        print(f"\nreport: {page}")
    if received:
        print(f"interrupted: what was measured until then is in {folder}", file=sys.stderr)
        return 128 + received
    return _exit_code(report, plan)


async def _drive(
    session: BenchSession, modes: BenchModeFlags, load: ArrivalOptions, wait_s: float
) -> tuple[RunReport, int]:
    """The report, and the number of the signal that interrupted the run, or 0."""
    from powerband.bench.session import interrupted_by_signals

    await session.open(wait_s)
    with interrupted_by_signals(session) as received:
        if modes.find_rate:
            report = await session.find_rate(load.rate)
        elif modes.sweep or modes.rates is not None:
            listed = [number(text, param="rates") for text in modes.rates.split(",")] if modes.rates is not None else []
            report = await session.sweep(listed)
        else:
            report = await session.single()
    return report, received[0] if received else 0


def _print_point(point: Point) -> None:
    """One line on stderr as each load of several ends."""
    summary = point.summary
    kept = "" if summary.attainment is None else f", SLO kept by {summary.attainment:.1%} of {summary.scheduled}"
    early = ", stopped early" if point.stopped else ""
    print(f"· {point.label}: {point.verdict}{kept}{early}", file=sys.stderr)


def _experiment(
    modes: BenchModeFlags,
    plan: Plan | None,
    target: ServerAddress,
    load: ArrivalOptions,
    requests: RequestOptions,
    server: TargetFlags,
    judging: SLOFlags,
) -> Experiment:
    """Raises UsageError for flags that do not go together."""
    from powerband.bench.load import LoadOptions
    from powerband.bench.session import Experiment
    from powerband.calibration.client_capacity import known_client_capacity

    if not 1 <= server.workers <= 256:
        raise UsageError(f"--workers is {server.workers}; it must be between 1 and 256.", param="workers")
    slo = judging.made() if plan is None else plan.slo
    if modes.find_rate and slo is None:
        raise UsageError("--find-rate needs an --slo.", hint="Give one: --slo ttft=500ms,tpot=50ms.", param="slo")
    asked = requested_load(replace(load, trace=None) if plan is not None else load, requests)
    workload = asked.workload
    if plan is not None:
        workload = replace(plan.workload, arrivals=plan.arrivals)
    elif modes.find_rate or modes.sweep or modes.rates is not None:
        given = [name for name in ("concurrency", "ramp", "steps") if getattr(load, name) is not None]
        if given:
            raise UsageError(f"--{given[0]} has no effect where rates are tried.", param=given[0])
    warm_up, cool_down = judging.shares()
    known = known_client_capacity()
    url = {None: "", "none": None}.get(server.metrics_url, server.metrics_url)
    return Experiment(
        target=_asking_for_form(target, workload, server),
        workload=workload,
        duration_s=asked.duration_s,
        num_requests=asked.num_requests,
        seed=load.seed,
        max_model_len=server.max_model_len,
        strict_lengths=requests.strict_lengths,
        slo=slo,
        warm_up=warm_up,
        cool_down=cool_down,
        options=LoadOptions(
            workers=server.workers, timeout_s=seconds(server.timeout, param="timeout"), metrics_url=url
        ),
        ceiling_chunks_per_s=known.chunks_per_s if known is not None else None,
    )


def _asking_for_form(target: ServerAddress, workload: Workload, flags: TargetFlags) -> ServerAddress:
    """The target with what the workload asks of answers. Raises UsageError where another endpoint is named."""
    from powerband.bench.client.answer_forms import asking_for, form_of

    form = form_of(workload)
    if form != "text" and target.endpoint != "chat" and (flags.endpoint or flags.backend):
        raise UsageError(
            f"The workload '{form}' is of chats.", hint="Leave --endpoint out, or name chat.", param="endpoint"
        )
    return asking_for(form, target)


def _plan(path: Path, load: ArrivalOptions, requests: RequestOptions, judging: SLOFlags) -> Plan:
    """Raises UsageError for flags that the plan decides."""
    from powerband.spec.plan import read_plan
    from powerband.spec.workload.traces import read_trace

    decided: dict[str, object] = {name: getattr(load, name) for name in ("rate", "concurrency", "ramp", "steps")}
    decided |= {name: value for name, value in vars(requests).items() if not isinstance(value, bool)}
    decided |= {"slo": judging.slo, "attainment": judging.attainment}
    for name, value in decided.items():
        if value is not None:
            raise UsageError(f"--{name.replace('_', '-')} is set by the plan.", hint="Leave it out.", param=name)
    return read_plan(path, read_trace(load.trace, format=load.trace_format) if load.trace is not None else None)


def _target(url: str, requests: RequestOptions, flags: TargetFlags) -> ServerAddress:
    """Raises UsageError."""
    from powerband.bench.client.messages import ServerAddress
    from powerband.bench.client.probe import parse_endpoint, parse_headers
    from powerband.http_client.request import server_url

    headers = parse_headers(flags.header or ())
    key = flags.api_key or os.environ.get("POWERBAND_API_KEY") or os.environ.get("OPENAI_API_KEY")
    if key:
        headers.setdefault("Authorization", f"Bearer {key.strip()}")
    extra: Any = {}
    if flags.extra_body is not None:
        with contextlib.suppress(ValueError):
            extra = json_format.loads(flags.extra_body)
        if not isinstance(extra, dict) or not extra:
            raise UsageError(
                "extra-body is not a JSON object.", hint='Write it like {"top_p": 0.9}.', param="extra_body"
            )
    return ServerAddress(
        base=server_url(url),
        endpoint=parse_endpoint(flags.endpoint, flags.backend),
        model=flags.model or "",
        headers=headers,
        extra=extra,
        ignore_eos=not requests.respect_eos,
        insecure=flags.insecure,
    )


def _exit_code(report: RunReport, plan: Plan | None) -> int:
    points = report.points
    if not any(point.whole.answered for point in points):
        return NO_ANSWER
    if report.found is not None:  # its invalid loads were repeated
        return 0 if report.found.requests_per_s else MISSED
    if any(point.verdict == "INVALID" for point in points):
        return INVALID
    if plan is not None and not _is_promise_kept(report, plan):
        return MISSED
    return MISSED if len(points) == 1 and points[0].verdict == "MISSED" else 0


def _is_promise_kept(report: RunReport, plan: Plan) -> bool:
    """The promised throughput; the SLO is judged as in any run."""
    promised, reached = plan.promise.output_tokens_per_s, report.points[0].summary.output_tokens_per_s
    if promised is None or reached >= promised:
        return True
    print(f"The plan promises {promised:g} output tokens a second; it was {reached:.4g}.", file=sys.stderr)
    return False


def _compare(folders: list[Path], output: OutputFlags) -> int:
    from rich.console import Console

    from powerband.bench.comparison.html_page import write_comparison
    from powerband.bench.report.compare import StoredRun, compare_runs
    from powerband.bench.report.compare_table import comparison_table

    if len(folders) < 2:
        raise UsageError("--compare needs two results folders or more.", hint="--compare BEFORE AFTER", param="compare")
    runs = [StoredRun.read(folder) for folder in folders]
    comparisons = [compare_runs(runs[0], run) for run in runs[1:]]
    if output.json:
        shown = [one.as_dict() for one in comparisons]
        print(json_format.dumps(shown[0] if len(shown) == 1 else shown, indent=1))
    else:
        for comparison in comparisons:
            Console().print(comparison_table(comparison))
    if output.out is not None or not output.json:
        page = (output.out or Path("bench-runs", datetime.now().strftime("%Y%m%d-%H%M%S-compared"))) / "compare.html"
        write_comparison(runs, page)
        print(f"\nreport: {page}", file=sys.stderr if output.json else sys.stdout)
    return 0


def _calibrate(*, as_json: bool) -> int:
    import asyncio

    from powerband.calibration.client_capacity import measure_client_capacity

    print("· measuring this client against a server that does nothing (20 s)", file=sys.stderr)
    found = asyncio.run(measure_client_capacity())
    if as_json:
        print(json_format.dumps(asdict(found), indent=1))
        return 0
    print(
        f"chunks      {found.chunks_per_s:,.0f} a second and process, {found.cpu_us_per_chunk:.1f} µs of CPU time each"
    )
    print(f"requests    {found.requests_per_s:,.0f} a second and process")
    print("Saved. Reports show how close to this limit the client was.")
    return 0


def _fault(modes: BenchModeFlags, target: ServerAddress, load: ArrivalOptions, *, as_json: bool) -> int:
    """Misbehave, and say how the server took it: 1 when it hurt others or no longer answers."""
    import asyncio

    from powerband.bench.client.probe import find_server
    from powerband.fault_injection.faults import FAULTS, run_fault

    kind = modes.fault or ""
    if kind == "list":
        print_table([[name, what] for name, what in FAULTS.items()])
        return 0
    length_s = seconds(load.duration or "10s", param="duration")

    async def inject() -> FaultResult:
        found, _ = await find_server(target)
        intensity = load.concurrency or 32
        return await run_fault(kind, found, seconds=length_s, intensity=intensity, allow_remote=modes.allow_remote)

    result = asyncio.run(inject())
    if as_json:
        print(json_format.dumps(asdict(result), indent=1))
    else:
        print_table(result.rows())
    return 0 if result.still_answers and not result.server_errors else MISSED
