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

from powerband.cost.latency import LatencyModel
from powerband.planner.closed_form import StepTimes
from powerband.planner.estimates import SizedReplica, binding, figures_of, notes, price_of, unit_of
from powerband.planner.plan_request import PlanRequest, WorkloadStats, weight
from powerband.planner.results import Banded, Evaluation
from powerband.spec.deployment import Deployment, Pool, Replica

_SHORT_SHARES = (0.5, 0.75, 0.9)  # of the requests: where prompts are divided
_FEWEST = 20  # requests of either side, to weigh it
_MOST = 24  # fleets that are told of, the cheapest first


def fleets(
    question: PlanRequest, units: Sequence[SizedReplica], requests: Sequence[WorkloadStats], turns: float
) -> list[Evaluation]:
    """The cheapest ones of two kinds of devices with a known price that could keep the SLO."""
    lengths = sorted(request.prompt for request in requests)
    bounds = sorted({lengths[int(share * len(lengths))] for share in _SHORT_SHARES})
    best = [
        unit for engine in question.engines for unit in _best(question, [u for u in units if u.kind.engine == engine])
    ]
    found: list[Evaluation] = []
    for longest in bounds:
        short = [request for request in requests if request.prompt <= longest]
        long = [request for request in requests if request.prompt > longest]
        if min(len(short), len(long)) < _FEWEST:
            continue
        sides = [[_for_share(question, unit, side, len(requests), turns) for unit in best] for side in (short, long)]
        for first, second in permutations(range(len(best)), 2):
            pools = sides[0][first], sides[1][second]
            is_pair = best[first].kind.engine == best[second].kind.engine
            if is_pair and best[first].replica.device != best[second].replica.device:
                found += _fleets_of(question, pools, longest)
    found = [fleet for fleet in found if fleet.usd_per_hour is not None]
    return sorted(found, key=lambda fleet: (not fleet.meets_slo, fleet.usd_per_hour))[:_MOST]


def _best(question: PlanRequest, units: Sequence[SizedReplica]) -> list[SizedReplica]:
    """Of each device, what serves most within the SLO for its price and for its devices, and at all for its price."""
    scores: tuple[Callable[[SizedReplica, float], float], ...] = (
        lambda unit, price: unit.kept_rate / price,
        lambda unit, _price: unit.kept_rate / unit.replica.num_devices,
        lambda unit, price: unit.forms[0].capacity / price,
    )
    found: list[SizedReplica] = []
    for device in {unit.replica.device: None for unit in units}:
        own = [(unit, price) for unit in units if unit.replica.device == device and (price := _price(question, unit))]
        for score in scores:
            best = max(own, key=lambda pair: score(*pair), default=None)
            if best is not None and best[0] not in found:
                found.append(best[0])
    return found


def _price(question: PlanRequest, unit: SizedReplica) -> float | None:
    return price_of(question, Deployment(engine=unit.kind.engine, pools=(Pool(replica=unit.replica),)))


def _for_share(
    question: PlanRequest, unit: SizedReplica, side: Sequence[WorkloadStats], of: int, turns: float
) -> tuple[SizedReplica, float] | None:
    """The unit under some of the requests, and their share."""
    replica, kind = unit.replica, unit.kind
    model = LatencyModel(question.spec, question.profile(replica.device), replica, kind.engine)
    found = weight(side, caching=replica.enable_prefix_caching, percentile=question.slo.attainment, turns=turns, of=of)
    made = unit_of(question, kind, replica, StepTimes(model, found, replica.draft_tokens), model.band)
    return None if made is None or made.kept_rate <= 0 else (made, found.share)


def _fleets_of(
    question: PlanRequest, pools: Sequence[tuple[SizedReplica, float] | None], longest: int
) -> Iterator[Evaluation]:
    """With as many replicas as it takes, as predicted and surely."""
    sides = [pool for pool in pools if pool is not None]
    if len(sides) < len(pools):
        return
    needed = [math.ceil(question.rate * share / unit.kept_rate) for unit, share in sides]
    surely = [
        math.ceil(question.rate * share / unit.sure_rate) if unit.sure_rate > 0 else count
        for (unit, share), count in zip(sides, needed, strict=True)
    ]
    for counts in {tuple(needed): None, tuple(surely): None}:
        devices = sum(count * unit.replica.num_devices for count, (unit, _) in zip(counts, sides, strict=True))
        if devices <= question.max_devices:
            yield _evaluated(question, sides, counts, longest)


def _evaluated(
    question: PlanRequest, sides: Sequence[tuple[SizedReplica, float]], counts: Sequence[int], longest: int
) -> Evaluation:
    replicas: list[Replica] = [unit.replica for unit, _ in sides]
    pools = tuple(
        Pool(replica=replica, count=count, longest_prompt=limit)
        for replica, count, limit in zip(replicas, counts, (longest, None), strict=True)
    )
    deployment = Deployment(engine=sides[0][0].kind.engine, pools=pools)
    each = [figures_of(unit, question.rate * share, count) for (unit, share), count in zip(sides, counts, strict=True)]
    shares = [share for _, share in sides]
    fullest = max(range(len(sides)), key=lambda i: question.rate * shares[i] / counts[i] / sides[i][0].kept_rate)
    unit, share = sides[fullest]
    operators, binds = binding(unit, question.rate * share / counts[fullest])
    figures = {name: _joined(name, [own[name] for own in each], shares) for name in each[0]}
    return Evaluation(
        deployment=deployment,
        method="closed form",
        figures=figures,
        meets_slo=figures["capacity"].low >= question.rate,
        usd_per_hour=price_of(question, deployment),
        binds=binds,
        operators=operators,
        kv_tokens=sides[-1][0].kind.memory.kv_tokens,
        weights_bytes=sides[-1][0].kind.memory.parts.get("weights", 0),
        notes=notes(question, deployment),
    )


def _joined(name: str, parts: Sequence[Banded], shares: Sequence[float]) -> Banded:
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
    return Banded(*joined)
