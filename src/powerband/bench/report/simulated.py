"""A simulated load in the load generator's own form, so that both can be read and compared alike."""

from __future__ import annotations

from collections.abc import Sequence

from powerband.bench.client.messages import Sample
from powerband.bench.client.probe import ServerInfo
from powerband.bench.load import LoadResult, steady_window
from powerband.bench.report.results import (
    ClientMachine,
    OfferedLoad,
    ReportedAddress,
    RunReport,
    build_point,
    powerband_version,
    utc_now,
    without_secrets,
)
from powerband.bench.saturation import is_saturated
from powerband.bench.server_metrics import ServerMetrics
from powerband.metrics.record import RequestRecord
from powerband.spec.plan import Plan
from powerband.spec.workload.schedule import Schedule
from powerband.spec.workload.workload import Workload


def simulated_load(
    schedule: Schedule, indices: Sequence[int], records: Sequence[RequestRecord], *, seconds: float, unsent: int
) -> LoadResult:
    """As if a load generator that takes no time had sent it. indices: of the requests that `records` are of."""
    requests = {
        request.index: (number, request) for number, chain in enumerate(schedule.chains) for request in chain.requests
    }
    samples = []
    for index, record in zip(indices, records, strict=True):
        number, request = requests[index]
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
        wall_s=seconds,
        client_share=0.0,
        chunks_per_s=0.0,
        unsent=unsent,
        stopped=False,
    )


def simulated_report(
    plan: Plan,
    workload: Workload,
    result: LoadResult,
    *,
    seed: int,
    warm_up: float,
    cool_down: float,
    command: Sequence[str],
) -> RunReport:
    """warm_up, cool_down: fractions of the load that are left out."""
    window = steady_window(result.samples, warm_up, cool_down)
    point = build_point(
        result,
        label="simulation",
        offered=OfferedLoad.of(workload.arrivals, result.schedule),
        warm_up=warm_up,
        cool_down=cool_down,
        slo=plan.slo,
        saturated=is_saturated([sample.record() for sample in result.samples], window),
    )
    return RunReport(
        started_at=utc_now(),
        command=without_secrets(command),
        powerband=powerband_version(),
        machine=ClientMachine.here(),
        target=ReportedAddress("a simulation", "completions", plan.model),
        server=ServerInfo(plan.deployment.engine if plan.deployment is not None else "unknown", "simulated", None),
        workload=workload.as_dict(),
        slo=plan.slo,
        seed=seed,
        warm_up=warm_up,
        cool_down=cool_down,
        points=(point,),
    )
