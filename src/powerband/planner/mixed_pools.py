"""Mixed fleets: short prompts on one kind of device, long ones on another, where each does what it is cheapest at.

    requests ──┬─ prompts up to a length ──► replicas of one device
               └─ longer ones ─────────────► replicas of another

Griggs et al., Mélange (2024), find that this can save more than half of the cost. In closed form, as all candidates at
first: each pool answers for its own share of the requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations

from powerband.planner.closed_form import StepTimes
from powerband.planner.estimates import SizedReplica, binding, deployment_price, estimate_figures, notes, size_replica
from powerband.planner.plan_request import PlanRequest, WorkloadStats, mean_tokens
from powerband.planner.results import Evaluation, Prediction
from powerband.spec.deployment import Deployment, Replica, ReplicaPool

_SHORT_RATIOS = (0.5, 0.75, 0.9)  # of the requests: where prompts are divided
_MIN_REQUESTS = 20  # requests of either side, to weigh it
_MAX_DEPLOYMENTS = 24  # fleets that are told of, the cheapest first


def mixed_deployments(
    plan_request: PlanRequest, units: Sequence[SizedReplica], requests: Sequence[WorkloadStats], turns: float
) -> list[Evaluation]:
    """The cheapest ones of two kinds of devices with a known price that could keep the SLO."""
    lengths = sorted(request.prompt for request in requests)
    bounds = sorted({lengths[int(share * len(lengths))] for share in _SHORT_RATIOS})
    best = [
        unit
        for engine in plan_request.engines
        for unit in _best(plan_request, [u for u in units if u.kind.engine == engine])
    ]
    found: list[Evaluation] = []
    for max_prompt_tokens in bounds:
        short = [request for request in requests if request.prompt <= max_prompt_tokens]
        long = [request for request in requests if request.prompt > max_prompt_tokens]
        if min(len(short), len(long)) < _MIN_REQUESTS:
            continue
        sides = [
            [_sized_for(plan_request, unit, side, len(requests), turns) for unit in best] for side in (short, long)
        ]
        for first, second in permutations(range(len(best)), 2):
            pools = sides[0][first], sides[1][second]
            is_pair = best[first].kind.engine == best[second].kind.engine
            if is_pair and best[first].replica.device != best[second].replica.device:
                found += _deployments(plan_request, pools, max_prompt_tokens)
    found = [deployment for deployment in found if deployment.usd_per_hour is not None]
    return sorted(found, key=lambda deployment: (not deployment.meets_slo, deployment.usd_per_hour))[:_MAX_DEPLOYMENTS]


def _best(plan_request: PlanRequest, units: Sequence[SizedReplica]) -> list[SizedReplica]:
    """Of each device, what serves most within the SLO for its price and for its devices, and at all for its price."""
    scores: tuple[Callable[[SizedReplica, float], float], ...] = (
        lambda unit, price: unit.slo_rate / price,
        lambda unit, _price: unit.slo_rate / unit.replica.num_devices,
        lambda unit, price: unit.forms[0].capacity / price,
    )
    found: list[SizedReplica] = []
    for device in {unit.replica.device: None for unit in units}:
        own = [
            (unit, price) for unit in units if unit.replica.device == device and (price := _price(plan_request, unit))
        ]
        for score in scores:
            best = max(own, key=lambda pair: score(*pair), default=None)
            if best is not None and best[0] not in found:
                found.append(best[0])
    return found


def _price(plan_request: PlanRequest, unit: SizedReplica) -> float | None:
    deployment = Deployment(engine=unit.kind.engine, pools=(ReplicaPool(replica=unit.replica),))
    return deployment_price(plan_request, deployment)["usd_per_hour"]


def _sized_for(
    plan_request: PlanRequest, unit: SizedReplica, side: Sequence[WorkloadStats], of: int, turns: float
) -> tuple[SizedReplica, float] | None:
    """The unit under some of the requests, and their share."""
    replica, kind = unit.replica, unit.kind
    model = plan_request.latency_model(replica, kind.engine)
    found = mean_tokens(
        side, caching=replica.enable_prefix_caching, percentile=plan_request.slo.attainment, turns=turns, of=of
    )
    sized = size_replica(plan_request, kind, replica, StepTimes(model, found, replica.draft_tokens), model.band)
    return None if sized is None or sized.slo_rate <= 0 else (sized, found.share)


def _deployments(
    plan_request: PlanRequest, pools: Sequence[tuple[SizedReplica, float] | None], max_prompt_tokens: int
) -> Iterator[Evaluation]:
    """With as many replicas as it takes, as predicted and surely."""
    sides = [pool for pool in pools if pool is not None]
    if len(sides) < len(pools):
        return
    needed = [math.ceil(plan_request.rate * share / unit.slo_rate) for unit, share in sides]
    pessimistic = [
        math.ceil(plan_request.rate * share / unit.guaranteed_rate) if unit.guaranteed_rate > 0 else count
        for (unit, share), count in zip(sides, needed, strict=True)
    ]
    for counts in {tuple(needed): None, tuple(pessimistic): None}:
        devices = sum(count * unit.replica.num_devices for count, (unit, _) in zip(counts, sides, strict=True))
        if devices <= plan_request.max_devices:
            yield _evaluate(plan_request, sides, counts, max_prompt_tokens)


def _evaluate(
    plan_request: PlanRequest,
    sides: Sequence[tuple[SizedReplica, float]],
    counts: Sequence[int],
    max_prompt_tokens: int,
) -> Evaluation:
    replicas: list[Replica] = [unit.replica for unit, _ in sides]
    pools = tuple(
        ReplicaPool(replica=replica, count=count, max_prompt_tokens=limit)
        for replica, count, limit in zip(replicas, counts, (max_prompt_tokens, None), strict=True)
    )
    deployment = Deployment(engine=sides[0][0].kind.engine, pools=pools)
    each = [
        estimate_figures(unit, plan_request.rate * share, count)
        for (unit, share), count in zip(sides, counts, strict=True)
    ]
    shares = [share for _, share in sides]
    fullest = max(range(len(sides)), key=lambda i: plan_request.rate * shares[i] / counts[i] / sides[i][0].slo_rate)
    unit, share = sides[fullest]
    operators, binds = binding(unit, plan_request.rate * share / counts[fullest])
    figures = {name: _combined(name, [own[name] for own in each], shares) for name in each[0]}
    return Evaluation(
        deployment=deployment,
        method="closed form",
        figures=figures,
        meets_slo=figures["capacity"].low >= plan_request.rate,
        **deployment_price(plan_request, deployment),
        binds=binds,
        operators=operators,
        kv_tokens=sides[-1][0].kind.memory.kv_tokens,
        weights_bytes=sides[-1][0].kind.memory.parts.get("weights", 0),
        notes=notes(plan_request, deployment),
    )


def _combined(name: str, parts: Sequence[Prediction], shares: Sequence[float]) -> Prediction:
    """Of all requests, from those of each pool: means by share, percentiles at most the largest, tokens in sum; a fleet
    holds as much as the pool that is full first.
    """
    edges = list(zip(*((part.value, part.low, part.high) for part in parts), strict=True))
    if name == "capacity":
        joined = [min(value / share for value, share in zip(edge, shares, strict=True)) for edge in edges]
    elif name == "output_tokens_per_s":
        joined = [sum(edge) for edge in edges]
    elif name.endswith("_mean_s"):
        joined = [sum(value * share for value, share in zip(edge, shares, strict=True)) for edge in edges]
    else:
        joined = [max(edge) for edge in edges]
    return Prediction(*joined)
