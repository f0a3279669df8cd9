"""Candidates of the first phase: every kind of replica, with several limits and counts, in closed form."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from powerband.cost.engine_priors import ENGINE_PRIORS
from powerband.cost.replica_memory import plan_replica
from powerband.planner.candidates import ReplicaOption
from powerband.planner.closed_form import HELD_OUTPUT, ClosedForm, StepTimes
from powerband.planner.picked import picked_count
from powerband.planner.plan_request import PlanRequest, WorkloadStats, mean_tokens
from powerband.planner.rate_curves import DeploymentPrice
from powerband.planner.results import Bound, Evaluation, Prediction
from powerband.spec.deployment import Deployment, Replica, ReplicaPool
from powerband.spec.hardware.catalog import usd_per_hour
from powerband.spec.quantities import count_text

# (max_num_seqs, max_num_batched_tokens): the default first.
LIMITS = ((256, 2048), (64, 2048), (256, 512), (256, 8192))
_BLOCKED = 0.9  # of the seats that memory allows: beyond, it is memory that binds
_WAITING = 0.5  # of the TTFT


@dataclass(frozen=True, slots=True)
class SizedReplica:
    """One kind of replica with its limits, under the workload. kept_rate: requests a second of one replica."""

    kind: ReplicaOption
    forms: tuple[ClosedForm, ClosedForm, ClosedForm]  # as predicted, and at the band's slow and fast edge
    slo_rate: float  # as predicted
    guaranteed_rate: float  # at the slow edge

    @property
    def replica(self) -> Replica:
        return self.kind.replica


def sized_replicas(
    plan_request: PlanRequest, kinds: Sequence[ReplicaOption], requests: Sequence[WorkloadStats], turns: float
) -> Iterator[SizedReplica]:
    """With every pair of limits that makes a difference and is not pinned."""
    percentile = plan_request.slo.attainment
    weights = {
        caching: mean_tokens(requests, caching=caching, percentile=percentile, turns=turns) for caching in (True, False)
    }
    for kind in kinds:
        model = plan_request.latency_model(kind.replica, kind.engine)
        times = StepTimes(model, weights[kind.replica.enable_prefix_caching], kind.replica.draft_tokens)
        band = model.band
        for seats, budget in LIMITS:
            limited = {"max_num_seqs": seats, "max_num_batched_tokens": budget, **plan_request.pinned}
            replica = replace(kind.replica, **limited)
            if (seats, budget) != LIMITS[0] and replica == replace(kind.replica, **dict(plan_request.pinned)):
                continue
            found = size_replica(plan_request, kind, replica, times, band)
            if found is not None:
                yield found


def size_replica(
    plan_request: PlanRequest, kind: ReplicaOption, replica: Replica, times: StepTimes, band: float
) -> SizedReplica | None:
    """`replica`: the kind's own with other limits. None: it does not fit."""
    profile = plan_request.profile(replica.device)
    memory = kind.memory if replica == kind.replica else plan_replica(plan_request.spec, profile, replica, kind.engine)
    if memory.problem:
        return None
    held = times.weight.prompt + times.weight.output * HELD_OUTPUT
    nominal, slowest, fastest = (
        ClosedForm(times, replica, memory.tokens_at(held), percentile=plan_request.slo.attainment, slowdown=slowdown)
        for slowdown in (1.0, 1 + band, 1 / (1 + band))
    )
    return SizedReplica(
        ReplicaOption(kind.engine, replica, memory),
        (nominal, slowest, fastest),
        nominal.slo_rate(plan_request.slo),
        slowest.slo_rate(plan_request.slo),
    )


def replica_counts(plan_request: PlanRequest, unit: SizedReplica) -> list[int]:
    """Numbers of replicas that are worth a look: what the rate takes, as predicted and surely, and one less."""
    max_count = max_replicas(plan_request, unit.replica)
    if max_count < 1:
        return []
    picked = picked_count(plan_request.pick, unit.kind.engine, unit.replica)
    if picked is not None and picked <= max_count:
        return [picked]
    if plan_request.replicas is not None:
        return [plan_request.replicas] if plan_request.replicas <= max_count else []
    if unit.slo_rate <= 0:
        return [min(max(math.ceil(plan_request.rate / unit.forms[0].capacity), 1), max_count)]
    needed = math.ceil(plan_request.rate / unit.slo_rate)
    pessimistic = math.ceil(plan_request.rate / unit.guaranteed_rate) if unit.guaranteed_rate > 0 else needed + 1
    wanted = {needed - 1, needed, pessimistic}
    if plan_request.objective != "cost":
        wanted |= {max_count, (max_count + needed) // 2}
    return sorted({min(max(count, 1), max_count) for count in wanted})


def max_replicas(plan_request: PlanRequest, replica: Replica) -> int:
    profile = plan_request.profile(replica.device)
    if profile.kind == "cpu":
        # A machine is one device, and holds as many replicas as its measured ones leave cores for.
        return profile.machine.cores // profile.machine.threads if profile.machine is not None else 1
    return plan_request.max_devices // replica.num_devices


def no_room_text(plan_request: PlanRequest, replica: Replica) -> str:
    """Why there can be none, or not as many as asked for."""
    machine, wanted = plan_request.profile(replica.device).machine, plan_request.replicas or 1
    room = max_replicas(plan_request, replica)
    if plan_request.profile(replica.device).kind == "cpu" and machine is not None:
        return (
            f"{count_text(wanted, 'replica')} have no room: this machine of {count_text(machine.cores, 'core')} was "
            f"measured with {count_text(machine.threads, 'thread')} each, so it holds {room}"
        )
    return f"{wanted} of {replica.num_devices} devices have no room: at most {plan_request.max_devices} may be used"


def estimate(plan_request: PlanRequest, unit: SizedReplica, count: int) -> Evaluation:
    """`count` of these replicas, each with an equal share of the rate."""
    deployment = Deployment(engine=unit.kind.engine, pools=(ReplicaPool(replica=unit.replica, count=count),))
    operators, binds = binding(unit, plan_request.rate / count)
    return Evaluation(
        deployment=deployment,
        method="closed form",
        figures=estimate_figures(unit, plan_request.rate, count),
        meets_slo=unit.guaranteed_rate * count >= plan_request.rate,
        **deployment_price(plan_request, deployment),
        binds=binds,
        operators=operators,
        kv_tokens=unit.kind.memory.kv_tokens,
        weights_bytes=unit.kind.memory.parts.get("weights", 0),
        notes=notes(plan_request, deployment),
    )


def estimate_figures(unit: SizedReplica, rate: float, count: int) -> dict[str, Prediction]:
    """Of so many replicas that share a rate, see outcome.Evaluation."""
    nominal, slow, fast = (form.at(rate / count) for form in unit.forms)
    output = unit.forms[0].output
    return {
        "ttft_s": Prediction(nominal.ttft_high_s, fast.ttft_high_s, slow.ttft_high_s),
        "ttft_mean_s": Prediction(nominal.ttft_s, fast.ttft_s, slow.ttft_s),
        "tpot_s": Prediction(nominal.tpot_high_s, fast.tpot_high_s, slow.tpot_high_s),
        "tpot_mean_s": Prediction(nominal.tpot_s, fast.tpot_s, slow.tpot_s),
        "e2e_mean_s": Prediction(nominal.e2e_s(output), fast.e2e_s(output), slow.e2e_s(output)),
        "output_tokens_per_s": Prediction(
            *(min(rate, form.capacity * count) * form.output_of_arrival for form in unit.forms)
        ),
        "capacity": estimate_capacity(unit, count),
    }


def estimate_capacity(unit: SizedReplica, count: int) -> Prediction:
    best = unit.forms[2].capacity
    return Prediction(
        unit.slo_rate * count, unit.guaranteed_rate * count, max(unit.slo_rate, min(best, unit.slo_rate * 1.5)) * count
    )


def deployment_price(plan_request: PlanRequest, deployment: Deployment) -> DeploymentPrice:
    """Dollars per hour of the cheapest machines, and which these are; None: not all have a known price."""
    total = 0.0
    machines: Counter[str] = Counter()
    for pool in deployment.pools:
        prices = plan_request.profile(pool.replica.device).prices
        found = usd_per_hour(prices, pool.count, pool.replica.num_devices)
        if found is None:
            return {"usd_per_hour": None, "machines": {}}
        total += found[0]
        machines.update(found[1])
    return {"usd_per_hour": total, "machines": dict(machines)}


def notes(plan_request: PlanRequest, deployment: Deployment) -> tuple[str, ...]:
    found = []
    for pool in deployment.pools:
        if pool.replica.offload_share:
            found.append(f"{pool.replica.offload_share:.0%} of the weights come from the host's memory in every step")
        if pool.replica.quantization not in ("none", plan_request.stored.quantization):
            found.append(f"weights in {pool.replica.quantization}: check the quality for your use")
        listed = [price for price in plan_request.profile(pool.replica.device).prices if price.confidence != "user"]
        devices = pool.replica.num_devices
        if listed and all(price.devices < devices for price in listed):
            found.append(
                f"no machine with {devices} {pool.replica.device} is listed: {devices} of them are priced singly"
            )
    if not ENGINE_PRIORS[deployment.engine].is_measured_on_gpus and any(
        plan_request.profile(pool.replica.device).kind != "cpu" for pool in deployment.pools
    ):
        found.append("our engine has not been measured on GPUs: its laws are those of other engines, its band is wider")
    return tuple(dict.fromkeys(found))


def binding(unit: SizedReplica, rate: float) -> tuple[dict[str, float], Bound]:
    """Of one replica at a rate: shares of its time by operator, and what binds."""
    found = unit.forms[0].at(rate)
    operators, bound = unit.forms[0].shares(found.running)
    if found.utilization >= 1:
        return operators, "memory" if found.by_memory else "queueing"
    if found.by_memory and found.running > _BLOCKED * unit.forms[0].seats:
        return operators, "memory"
    if found.wait_s > _WAITING * found.ttft_s and found.utilization > _BLOCKED:
        return operators, "queueing"
    return operators, bound
