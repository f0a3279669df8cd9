"""One simulation of a deployment, and the figures that a plan needs of it. A task is a value: other processes do it."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from powerband.metrics.record import Outcome, RequestRecord, percentile
from powerband.metrics.slo import slo_misses
from powerband.planner.plan_request import PlanRequest
from powerband.planner.simulation.inputs import simulation_inputs
from powerband.planner.simulation.simulator import Simulation
from powerband.spec.deployment import Deployment
from powerband.spec.slo import SLO

MAX_REPLICAS = 4  # that are simulated; more equal ones behave like these
_WARM_UP = 0.15  # of the time in which requests arrive
_HOPELESS, _MIN_HOPELESS = 0.25, 100  # of the requests that wait for a first token: it is not played to its end
_MAX_KEPT_LIMITS = 64  # pairs of limits
_MAX_UNSERVED = 0.1  # of the requests: refused, or without a first token when the last one arrives


@dataclass(frozen=True, slots=True)
class SimulationTask:
    """One simulation of a deployment."""

    deployment: Deployment
    rate: float  # of the whole deployment
    num_requests: int
    slowdown: float = 1.0  # factor on every time


@dataclass(frozen=True, slots=True)
class SimulationSummary:
    """What a simulation found."""

    task: SimulationTask
    figures: Mapping[str, float]  # see planner.results.Evaluation
    operators: Mapping[str, float]  # fractions of a replica's busy time
    bounds: Mapping[str, float]  # fractions of a replica's busy time by bottleneck
    keeps_up: bool  # the queue does not grow, and the gateway rejects few requests
    short_of_memory: float  # fraction of steps in which a request waited for blocks
    kept_limits: tuple[tuple[float, float], ...] = ()  # see planner.results.SimulatedRate


def run_simulation_task(plan_request: PlanRequest, task: SimulationTask) -> SimulationSummary:
    """Raises EnvironmentFault or UsageError where the deployment cannot be, see planner.models."""
    deployment, share = _scaled(task.deployment)
    made = simulation_inputs(
        plan_request.spec,
        deployment,
        plan_request.profile,
        constrained=plan_request.workload.constrains_answers,
    )
    schedule = plan_request.schedule(task.rate * share, task.num_requests)
    hopeless = max(_HOPELESS * schedule.num_requests, _MIN_HOPELESS)
    simulation = made.simulate(
        schedule,
        slowdown=task.slowdown,
        planned_rate=task.rate * share,
        slo_ttft_s=plan_request.slo.ttft_s,
        max_waiting=hopeless,
    )
    last_s = max(record.scheduled_s for record in simulation.records)
    counted = [record for record in simulation.records if record.scheduled_s >= _WARM_UP * last_s] or simulation.records
    tokens = _tokens_between(simulation.records, _WARM_UP * last_s, last_s)
    figures = _latencies(counted, plan_request.slo.attainment * 100)
    figures["attainment"] = sum(_meets_slo(record, plan_request) for record in counted) / len(counted)
    figures["output_tokens_per_s"] = tokens / max(last_s * (1 - _WARM_UP), 1e-9) / share
    kept_limits = _kept_limits(counted, plan_request.slo)
    unserved = simulation.num_refused + _backlog(simulation.records, last_s)
    steps = simulation.total("num_steps")
    keeps_up = not simulation.gave_up and unserved <= max(_MAX_UNSERVED * len(simulation.records), 2.0)
    return SimulationSummary(
        task=task,
        figures=figures,
        operators=_time_shares(simulation, "operators"),
        bounds=_time_shares(simulation, "bounds"),
        keeps_up=keeps_up,
        short_of_memory=simulation.total("short_of_memory") / steps if steps else 0.0,
        kept_limits=kept_limits if keeps_up else (),
    )


def _scaled(deployment: Deployment) -> tuple[Deployment, float]:
    """With fewer of the same replicas, and their share of the load."""
    pool = deployment.pools[0]
    if len(deployment.pools) > 1 or pool.count <= MAX_REPLICAS:
        return deployment, 1.0
    return replace(deployment, pools=(replace(pool, count=MAX_REPLICAS),)), MAX_REPLICAS / pool.count


def _meets_slo(record: RequestRecord, plan_request: PlanRequest) -> bool:
    return record.outcome is Outcome.OK and not slo_misses(record, plan_request.slo)


def _kept_limits(records: Sequence[RequestRecord], slo: SLO) -> tuple[tuple[float, float], ...]:
    """Limits of (TTFT, TPOT): each limit of TTFT at which a narrower one of TPOT is kept by enough of the requests."""
    others = replace(slo, ttft_s=None, tpot_s=None)
    kept = [record for record in records if record.outcome is Outcome.OK and not slo_misses(record, others)]
    needed = next(count for count in range(len(records) + 1) if count >= slo.attainment * len(records) - 1e-9)
    by_ttft = sorted((record.ttft_s, record.tpot_s or 0.0) for record in kept if record.ttft_s is not None)
    found: list[tuple[float, float]] = []
    tpots: list[float] = []
    for ttft_s, tpot_s in by_ttft:
        insort(tpots, tpot_s)
        least = tpots[max(needed, 1) - 1] if len(tpots) >= needed else math.inf
        if math.isfinite(least) and (not found or least < found[-1][1]):
            found.append((ttft_s, least))
    return tuple(found[:: math.ceil(len(found) / _MAX_KEPT_LIMITS) or 1])


def _latencies(records: Sequence[RequestRecord], at: float) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        values = [value for record in records if (value := getattr(record, name)) is not None]
        if values:
            found[name] = percentile(values, at)
            found[f"{name[:-2]}_mean_s"] = sum(values) / len(values)
    return found


def _tokens_between(records: Sequence[RequestRecord], start_s: float, end_s: float) -> int:
    return sum(
        tokens
        for record in records
        for time_s, tokens in zip(record.chunk_times_s, record.chunk_tokens, strict=True)
        if start_s <= time_s < end_s
    )


def _backlog(records: Sequence[RequestRecord], time_s: float) -> int:
    """Requests that wait for their first token at a time."""
    return sum(record.scheduled_s <= time_s and (record.chunk_times_s or (time_s,))[0] > time_s for record in records)


def _time_shares(simulation: Simulation, name: str) -> dict[str, float]:
    """Of all replicas together, the largest first."""
    seconds: dict[str, float] = {}
    for replica in simulation.replicas:
        for key, value in getattr(replica, name).items():
            seconds[key] = seconds.get(key, 0.0) + value
    whole = sum(seconds.values()) or 1.0
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return {key: value / whole for key, value in ordered if value > 0}
