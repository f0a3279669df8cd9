"""Which of the evaluated deployments is best, which ones nothing beats, and what lies beside the choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from powerband.planner.plan_request import PlanRequest
from powerband.planner.results import Evaluation, Objective
from powerband.spec.plan import Plan, PlanCost, Promise, absolute_model

_MARGIN = 1.05  # a latency that is better by less is no reason of its own
_SAME_PRICE = 1e-3  # of a price
_CLEARLY_FASTER = 0.9  # of a latency: what is lower than this share of it is faster
_USED = ("ttft_s", "tpot_s")  # by which the frontier is drawn, beside the price


def price(evaluation: Evaluation) -> tuple[bool, float]:
    """(no price is known, dollars per hour or, without a known price, the number of devices).

    What has no known price counts as dearer than all that has one.
    """
    if evaluation.usd_per_hour is None:
        return True, float(evaluation.deployment.num_devices)
    return False, evaluation.usd_per_hour


def have_one_price(first: Evaluation, second: Evaluation) -> bool:
    """Whether two deployments cost the same, or have no known price and as many devices."""
    (ours, amount), (theirs, other) = price(first), price(second)
    return ours == theirs and abs(amount - other) < _SAME_PRICE * other


def order(objective: Objective, evaluation: Evaluation) -> tuple[float, ...]:
    """The smaller the better."""
    unpriced, amount = price(evaluation)
    capacity = evaluation.figures["capacity"].low
    latency = evaluation.figures["e2e_mean_s"].high  # what can be promised
    if objective == "latency":
        return latency, unpriced, amount, -capacity
    if objective == "throughput":
        return -capacity, unpriced, amount, latency
    return unpriced, amount, latency, -capacity


def within_budget(plan_request: PlanRequest, evaluation: Evaluation) -> bool:
    if plan_request.budget_usd_per_h is None:
        return True
    return evaluation.usd_per_hour is not None and evaluation.usd_per_hour <= plan_request.budget_usd_per_h


def recommended(plan_request: PlanRequest, evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """Of those that were simulated, keep the SLO and are within the budget."""
    able = [
        evaluation
        for evaluation in evaluations
        if evaluation.method == "simulation" and evaluation.meets_slo and within_budget(plan_request, evaluation)
    ]
    return min(able, key=lambda evaluation: order(plan_request.objective, evaluation), default=None)


def alternatives(
    plan_request: PlanRequest, chosen: Evaluation | None, evaluations: Sequence[Evaluation]
) -> dict[str, Evaluation]:
    """'cheaper' and 'faster': the next ones beside the choice; 'nearest': where there is none."""
    if chosen is None:
        near = min(evaluations, key=lambda evaluation: _excess(plan_request, evaluation), default=None)
        return {"nearest": near} if near is not None else {}
    found = {}
    cheaper = [e for e in evaluations if price(e) < price(chosen) and not have_one_price(e, chosen) and _is_finite(e)]
    if cheaper:
        found["cheaper"] = min(cheaper, key=lambda e: _excess(plan_request, e))
    tpot_s, e2e_s = chosen.figures["tpot_mean_s"].value, chosen.figures["e2e_mean_s"].value
    faster = [
        e
        for e in evaluations
        if e.meets_slo
        and within_budget(plan_request, e)
        and e.figures["e2e_mean_s"].value < _CLEARLY_FASTER * e2e_s
        and e.figures["tpot_mean_s"].value < tpot_s
    ]
    if faster:
        found["faster"] = min(faster, key=lambda e: (price(e), e.figures["e2e_mean_s"].value))
    return found


def marked(evaluations: Sequence[Evaluation], chosen: Evaluation | None = None) -> list[Evaluation]:
    """With `dominated` where another is cheaper or as cheap, and in TTFT and TPOT better or worse by a hair only.

    What never ends is dominated, too; of those that are alike, what was chosen is not.
    """
    points = [(*price(e), *(e.figures[name].value for name in _USED)) for e in evaluations]
    ordered = sorted(range(len(points)), key=lambda i: (points[i], -evaluations[i].figures["capacity"].low))
    kept: list[tuple[float, ...]] = []
    dominated = [True] * len(points)
    for i in ordered:
        point = points[i]
        is_beaten = any(_beats(other, point) for other in kept)
        if math.isfinite(point[2]) and (not is_beaten or evaluations[i] is chosen):
            dominated[i] = False
            kept.append(point)
    return [replace(e, dominated=beaten) for e, beaten in zip(evaluations, dominated, strict=True)]


def _beats(other: tuple[float, ...], point: tuple[float, ...]) -> bool:
    """Costs no more, and is slower by a hair at most. What a deployment without a price costs beside one is unknown."""
    is_no_dearer = other[0] == point[0] and other[1] <= point[1]
    return is_no_dearer and all(a <= b * _MARGIN for a, b in zip(other[2:], point[2:], strict=True))


def _excess(plan_request: PlanRequest, evaluation: Evaluation) -> tuple[float, ...]:
    """How far the worst limit is exceeded at the pessimistic edge, what is answered all the same, and the price."""
    worst = 1.0
    for name, limit in plan_request.slo.limits.items():
        figure = evaluation.figures.get(f"{name}_s")
        if figure is not None:
            worst = max(worst, figure.high / limit)
    if plan_request.budget_usd_per_h and not within_budget(plan_request, evaluation):
        unknown = evaluation.usd_per_hour is None
        worst = max(worst, math.inf if unknown else (evaluation.usd_per_hour or 0.0) / plan_request.budget_usd_per_h)
    return worst, -evaluation.figures["output_tokens_per_s"].value, *price(evaluation)


def _is_finite(evaluation: Evaluation) -> bool:
    return math.isfinite(evaluation.figures["ttft_s"].value)


def plan_from(plan_request: PlanRequest, chosen: Evaluation) -> Plan:
    """The plan of a deployment. It promises what is predicted at the pessimistic end."""
    cost = None
    if chosen.usd_per_hour is not None and chosen.usd_per_million_tokens is not None:
        cost = PlanCost(
            usd_per_hour=chosen.usd_per_hour,
            usd_per_million_tokens=chosen.usd_per_million_tokens,
            machines=chosen.machines,
        )
    return Plan(
        model=absolute_model(plan_request.model),
        workload=plan_request.workload,
        slo=plan_request.slo,
        promise=Promise(plan_request.rate, chosen.figures["output_tokens_per_s"].low),
        deployment=chosen.deployment,
        predicted=dict(chosen.figures),
        cost=cost,
    )
