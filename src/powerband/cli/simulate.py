"""`powerband simulate`: play a load through a plan in virtual time, and report as the load generator does."""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from powerband.cli.bench_options import Asked, JudgingFlags, LoadFlags, MixFlags, asked_for
from powerband.cli.flags import Json
from powerband.cli.planning import chosen_devices, model_of
from powerband.errors import UsageError

if TYPE_CHECKING:
    from powerband.bench.load import LoadResult
    from powerband.bench.results import RunReport
    from powerband.planner.simulator import Simulation
    from powerband.spec.deployment import Deployment
    from powerband.spec.plan import Plan
    from powerband.spec.profile import DeviceProfile
    from powerband.spec.workload import Schedule

MISSED, NO_ANSWER = 1, 4
_DEVICES = Group("Devices", sort_key=4)
_OUTPUT = Group("Output", sort_key=5)


def simulate(
    plan: Annotated[Path, Parameter(help="A file that 'powerband plan -o' wrote")],
    /,
    *,
    load: LoadFlags | None = None,
    requests: MixFlags | None = None,
    judging: JudgingFlags | None = None,
    devices: Annotated[
        str | None,
        Parameter(help="FILE.yaml that describes those that the catalog has not", group=_DEVICES),
    ] = None,
    set: Annotated[
        list[str] | None,
        Parameter(help="What if: device.memory_bytes=48e9, L4.bandwidth_bytes_per_s=4e11", group=_DEVICES, negative=""),
    ] = None,
    out: Annotated[Path | None, Parameter(help="Folder; default: a new one in bench-runs/", group=_OUTPUT)] = None,
    json: Annotated[Json, Parameter(group=_OUTPUT)] = False,
) -> int:
    """Play a load through a PLAN's deployment without running it.

    Without options: the plan's own workload at the promised rate, judged by its SLO. The gateway's own
    dispatcher decides where and when each request goes, and the engine's own scheduler every step; a model
    of the devices says how long it takes.
    Writes run.json, requests.jsonl and report.html like 'powerband bench', which compares with them.
    Exits with 1 when the SLO is missed.
    """
    from powerband.planner.simulation_inputs import simulation_inputs
    from powerband.spec.plan import read_plan
    from powerband.spec.traces import read_trace

    load, requests, judging = load or LoadFlags(), requests or MixFlags(), judging or JudgingFlags()
    trace = read_trace(load.trace, format=load.trace_format) if load.trace is not None else None
    known = read_plan(plan, trace)
    if known.deployment is None:
        raise UsageError(
            f"{plan} says what is promised, but not by which deployment.",
            hint="'powerband plan MODEL -o plan.yaml' writes both.",
            param="plan",
        )
    asked = _asked(known, load, requests)
    schedule = asked.workload.draw(load.seed, duration_s=asked.duration_s, num_requests=asked.num_requests)
    made = simulation_inputs(model_of(known.model)[0], known.deployment, _finder(known.deployment, devices, set or []))
    print(f"· simulating {schedule.num_requests} requests", file=sys.stderr)
    # The service of this plan knows its promise and its SLO, whatever SLO the load is judged by.
    played = made.simulate(schedule, planned_rate=known.promise.rate, slo_ttft_s=known.slo.ttft_s)
    result = _load_result(schedule, played)
    known = replace(known, slo=judging.made() or known.slo)
    return _report(known, asked, load.seed, result, judging, out, as_json=json)


def _finder(deployment: Deployment, devices: str | None, changes: list[str]) -> Callable[[str], DeviceProfile]:
    """From a device's name in the plan to what is known of it. Raises UsageError."""
    named = list(dict.fromkeys(pool.replica.device for pool in deployment.pools))
    if any(change.startswith("replica.") for change in changes):
        raise UsageError("A replica is what the plan says it is.", hint="Change it in the plan's file.", param="set")
    profiles = {profile.name: profile for profile in chosen_devices(devices or ",".join(named), None, changes)}
    missing = [name for name in named if name not in profiles]
    if missing:
        raise UsageError(
            f"The plan's {missing[0]} is not among {', '.join(profiles)}.",
            hint="--devices names all of a plan's devices.",
            param="devices",
        )
    return profiles.__getitem__


def _asked(plan: Plan, load: LoadFlags, requests: MixFlags) -> Asked:
    """What the flags say; where they say nothing of what or when, the plan's workload and rate."""
    told = [load.rate, load.concurrency, load.ramp, load.steps, load.trace, load.burstiness, load.speedup]
    asked = asked_for(load, requests)
    says_when = any(value is not None for value in told)
    says_what = load.trace is not None or requests != MixFlags()
    workload = asked.workload if says_what else replace(asked.workload, name=plan.workload.name)
    if not says_what:
        workload = replace(workload, requests=plan.workload.requests)
    if not says_when:
        workload = replace(workload, arrivals=plan.arrivals)
    return replace(asked, workload=workload)


def _load_result(schedule: Schedule, played: Simulation) -> LoadResult:
    """As if a load generator that takes no time had sent it."""
    from powerband.bench.load import LoadResult
    from powerband.bench.messages import Sample
    from powerband.bench.server_metrics import ServerMetrics

    where = {
        request.index: (number, request) for number, chain in enumerate(schedule.chains) for request in chain.requests
    }
    samples = []
    for index, record in zip(played.indices, played.records, strict=True):
        number, request = where[index]
        samples.append(
            Sample(
                index=index,
                chain=number,
                turn=request.turn,
                scheduled_s=record.scheduled_s,
                sent_s=record.sent_s,
                chunk_times_s=record.chunk_times_s,
                chunk_tokens=record.chunk_tokens,
                outcome=record.outcome,
                finish_reason="length" if record.output_tokens else "",
                asked_tokens=request.output_tokens,
                prompt_tokens=record.prompt_tokens,
                output_tokens=record.output_tokens,
                cached_tokens=record.cached_tokens,
            )
        )
    return LoadResult(
        schedule=schedule,
        samples=tuple(samples),
        server=ServerMetrics(),
        wall_s=played.seconds,
        client_share=0.0,
        chunks_per_s=0.0,
        unsent=played.unsent,
        stopped=False,
    )


def _report(
    plan: Plan, asked: Asked, seed: int, result: LoadResult, judging: JudgingFlags, out: Path | None, *, as_json: bool
) -> int:
    from rich.console import Console

    from powerband.bench.report import write_report
    from powerband.bench.result_files import run_as_dict, write_run
    from powerband.bench.table import run_table

    report = _run_report(plan, asked, seed, result, judging)
    folder = out or Path("bench-runs", datetime.now().strftime("%Y%m%d-%H%M%S-simulated"))
    write_run(report, [result], folder)
    page = folder / "report.html"
    write_report(report, [result.samples], page)
    if as_json:
        print(json_format.dumps(run_as_dict(report), indent=1))
    else:
        Console().print(run_table(report))
        print(f"\nreport: {page}")
    point = report.points[0]
    if not point.whole.answered:
        return NO_ANSWER
    return MISSED if point.verdict == "MISSED" else 0


def _run_report(plan: Plan, asked: Asked, seed: int, result: LoadResult, judging: JudgingFlags) -> RunReport:
    from powerband.bench.load import window_of
    from powerband.bench.probe import Server
    from powerband.bench.results import (
        Address,
        Machine,
        Offered,
        RunReport,
        point_of,
        powerband_version,
        utc_now,
        without_secrets,
    )
    from powerband.bench.saturation import is_saturated

    warm_up, cool_down = judging.shares()
    window = window_of(result.samples, warm_up, cool_down)
    point = point_of(
        result,
        label="simulation",
        offered=Offered.of(asked.workload.arrivals, result.schedule),
        warm_up=warm_up,
        cool_down=cool_down,
        slo=plan.slo,
        saturated=is_saturated([sample.record() for sample in result.samples], window),
    )
    return RunReport(
        started_at=utc_now(),
        command=without_secrets(["powerband", *sys.argv[1:]]),
        powerband=powerband_version(),
        machine=Machine.here(),
        target=Address("a simulation", "completions", plan.model),
        server=Server(plan.deployment.engine if plan.deployment is not None else "unknown", "simulated", None),
        workload=asked.workload.as_dict(),
        slo=plan.slo,
        seed=seed,
        warm_up=warm_up,
        cool_down=cool_down,
        points=(point,),
    )
