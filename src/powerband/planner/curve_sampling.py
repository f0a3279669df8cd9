"""Puts the closed forms of evaluations into numbers, see `rate_curves`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from powerband.planner.closed_form import ClosedForm
from powerband.planner.estimates import SizedReplica, deployment_price, max_replicas
from powerband.planner.plan_request import PlanRequest
from powerband.planner.rate_curves import DeploymentPrice, RateCurve, SpeedCurve, curve_points
from powerband.planner.results import Evaluation
from powerband.spec.deployment import Deployment, EngineName, Replica, ReplicaPool


def with_curves(
    plan_request: PlanRequest, evaluations: Iterable[Evaluation], sized: Iterable[SizedReplica]
) -> list[Evaluation]:
    """Each evaluation of equal replicas with the curve of their kind."""
    points = curve_points(plan_request.slo.attainment)
    units = {(unit.kind.engine, unit.replica): unit for unit in sized}
    prices: dict[tuple[str, int], tuple[DeploymentPrice, ...]] = {}
    curves: dict[tuple[EngineName, Replica], RateCurve] = {}
    found = []
    for evaluation in evaluations:
        key = evaluation.deployment.engine, evaluation.deployment.pools[0].replica
        if len(evaluation.deployment.pools) == 1 and key in units:
            machine = units[key].replica.device, units[key].replica.num_devices
            if machine not in prices:
                prices[machine] = tuple(_prices(plan_request, units[key]))
            if key not in curves:
                curves[key] = rate_curve(units[key], prices[machine], points)
            evaluation = replace(evaluation, curve=curves[key])
        found.append(evaluation)
    return found


def rate_curve(unit: SizedReplica, prices: Sequence[DeploymentPrice], points: tuple[float, ...]) -> RateCurve:
    predicted, slow, fast = (_speed_curve(form, points) for form in unit.forms)
    form = unit.forms[0]
    return RateCurve(predicted, slow, fast, form.output, form.output_of_arrival, tuple(prices))


def _speed_curve(form: ClosedForm, points: tuple[float, ...]) -> SpeedCurve:
    found = [form.at(share * form.capacity) for share in points]
    return SpeedCurve(
        points,
        form.capacity,
        tuple(one.ttft_high_s for one in found),
        tuple(one.tpot_high_s for one in found),
        tuple(one.e2e_s(form.output) for one in found),
    )


def _prices(plan_request: PlanRequest, unit: SizedReplica) -> Iterable[DeploymentPrice]:
    if plan_request.replicas is not None:
        return
    for count in range(1, max_replicas(plan_request, unit.replica) + 1):
        pools = (ReplicaPool(replica=unit.replica, count=count),)
        yield deployment_price(plan_request, Deployment(engine=unit.kind.engine, pools=pools))
