"""`powerband simulate`: play a load through a plan in virtual time, and report as the load generator does."""

from __future__ import annotations

import json as json_format
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from powerband.cli.bench.options import SLOFlags
from powerband.cli.flags import Json
from powerband.cli.load_options import ArrivalOptions, MixOptions
from powerband.cli.plan.inputs import read_model
from powerband.errors import UsageError
from powerband.spec.quantities import count_text
from powerband.spec.workload.fitting import refuse_cuts
from powerband.spec.workload.options import RequestedLoad, has_requests, requested_load

if TYPE_CHECKING:
    from powerband.bench.load import LoadResult
    from powerband.bench.report.results import RunReport
    from powerband.spec.deployment import Deployment
    from powerband.spec.plan import Plan

MISSED, NO_ANSWER = 1, 4
_DEVICES = Group("Devices", sort_key=4)
_OUTPUT = Group("Output", sort_key=5)


def simulate(
    plan: Annotated[Path, Parameter(help="A file that 'powerband plan -o' wrote")],
    /,
    *,
    load: ArrivalOptions | None = None,
    requests: MixOptions | None = None,
    judging: SLOFlags | None = None,
    devices: Annotated[
        str | None, Parameter(help="FILE.yaml with devices that are not in the catalog", group=_DEVICES)
    ] = None,
    set: Annotated[
        list[str] | None,
        Parameter(help="What if: device.memory_bytes=48e9, L4.bandwidth_bytes_per_s=4e11", group=_DEVICES, negative=""),
    ] = None,
    out: Annotated[
        Path | None, Parameter(help="Results folder; default: a new one in bench-runs/", group=_OUTPUT)
    ] = None,
    json: Annotated[Json, Parameter(group=_OUTPUT)] = False,
) -> int:
    """Simulate a load on a PLAN's deployment.

    Without options: the plan's own workload and SLO at the promised rate. The gateway's own dispatcher
    and the engine's own scheduler decide; a performance model predicts how long each step takes.
    Writes run.json, requests.jsonl and report.html like 'powerband bench', which compares with them.
    Exits with 1 when the SLO is missed.
    """
    from powerband.bench.report.simulated import simulated_load, simulated_report
    from powerband.planner.simulation.inputs import profile_finder, simulation_inputs

    load, requests, judging = load or ArrivalOptions(), requests or MixOptions(), judging or SLOFlags()
    known, deployment = _plan_with_deployment(plan, load)
    asked = _requested_load(known, deployment, load, requests)
    schedule = asked.workload.draw(load.seed, duration_s=asked.duration_s, num_requests=asked.num_requests)
    if requests.strict_lengths:
        refuse_cuts(schedule.cut, schedule.num_requests)
    find = profile_finder(deployment, devices, set or [])
    constrained = asked.workload.constrains_answers
    made = simulation_inputs(read_model(known.model)[0], deployment, find, constrained=constrained)
    print(f"· simulating {count_text(schedule.num_requests, 'request')}", file=sys.stderr)
    if schedule.cut_text:
        print(f"· {schedule.cut_text}", file=sys.stderr)
    simulated = made.simulate(schedule, planned_rate=known.promise.rate, slo_ttft_s=known.slo.ttft_s)
    result = simulated_load(
        schedule, simulated.indices, simulated.records, seconds=simulated.seconds, unsent=simulated.unsent
    )
    warm_up, cool_down = judging.shares()
    report = simulated_report(
        replace(known, slo=judging.made() or known.slo),
        asked.workload,
        result,
        seed=load.seed,
        warm_up=warm_up,
        cool_down=cool_down,
        command=["powerband", *sys.argv[1:]],
    )
    return _report(report, result, out, as_json=json)


def _plan_with_deployment(path: Path, load: ArrivalOptions) -> tuple[Plan, Deployment]:
    """Raises UsageError."""
    from powerband.spec.plan import read_plan
    from powerband.spec.workload.traces import read_trace

    trace = read_trace(load.trace, format=load.trace_format) if load.trace is not None else None
    plan = read_plan(path, trace)
    if plan.deployment is None:
        raise UsageError(
            f"{path} has an SLO guarantee but no deployment.",
            hint="'powerband plan MODEL -o plan.yaml' writes both.",
            param="plan",
        )
    return plan, plan.deployment


def _requested_load(plan: Plan, deployment: Deployment, load: ArrivalOptions, requests: MixOptions) -> RequestedLoad:
    """What the flags say; where they say nothing of what or when, the plan's workload and rate. No request is longer
    than the plan's replicas allow.
    """
    given = [load.rate, load.concurrency, load.ramp, load.steps, load.trace, load.burstiness, load.speedup]
    asked = requested_load(load, requests)
    has_arrivals = any(value is not None for value in given)
    workload = asked.workload if load.trace is not None or has_requests(requests) else plan.workload
    workload = replace(workload, arrivals=asked.workload.arrivals if has_arrivals else plan.arrivals)
    return replace(asked, workload=workload.within(max(pool.replica.max_model_len for pool in deployment.pools)))


def _report(report: RunReport, result: LoadResult, out: Path | None, *, as_json: bool) -> int:
    from rich.console import Console

    from powerband.bench.report.html_report import write_report
    from powerband.bench.report.result_files import run_as_dict, write_run
    from powerband.bench.report.table import run_table

    folder = out or Path("bench-runs", datetime.now().strftime("%Y%m%d-%H%M%S-simulated"))
    write_run(report, [result], folder)
    page = folder / "report.html"
    write_report(report, [result], page)
    if as_json:
        print(json_format.dumps(run_as_dict(report), indent=1))
    else:
        Console().print(run_table(report))
        print(f"\nreport: {page}")
    point = report.points[0]
    if not point.whole.answered:
        return NO_ANSWER
    return MISSED if point.verdict == "MISSED" else 0
