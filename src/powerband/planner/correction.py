"""What simulations say of closed forms, applied to those that were not simulated: so that figures can be compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from powerband.planner.results import Evaluation, Prediction
from powerband.spec.deployment import Deployment
from powerband.spec.slo import SLO

_CORRECTED = ("ttft_s", "ttft_mean_s", "tpot_s", "tpot_mean_s", "e2e_mean_s")
_MIN_SIMULATED = 3
_JUST_BELOW = 0.99  # of a rate that is not kept


def corrected(
    evaluations: Sequence[Evaluation], before: Mapping[Deployment, Evaluation], slo: SLO, rate: float
) -> list[Evaluation]:
    """before: the closed form of every deployment. Latencies of closed forms, times the median ratio of simulated ones
    to theirs; and what follows from them: whether the SLO is kept, and up to which rate.
    """
    usual = _factors([e for e in evaluations if e.method == "simulation"], before)
    found = []
    for evaluation in evaluations:
        if evaluation.method == "simulation":
            own = usual | _own_factors(evaluation, before[evaluation.deployment])
            found.append(_with_capacity(replace(evaluation, corrections=own), slo, rate))
        else:
            found.append(_judged(_times(evaluation, usual), slo, rate))
    return found


def _factors(simulated: Sequence[Evaluation], before: Mapping[Deployment, Evaluation]) -> dict[str, float]:
    ratios = [_own_factors(e, before[e.deployment]) for e in simulated]
    known = {name: [own[name] for own in ratios if name in own] for name in _CORRECTED}
    return {name: median(values) for name, values in known.items() if len(values) >= _MIN_SIMULATED}


def _own_factors(simulated: Evaluation, before: Evaluation) -> dict[str, float]:
    """Of one deployment: what was simulated, by its closed form."""
    pairs = {name: (simulated.figures[name].value, before.figures[name].value) for name in _CORRECTED}
    return {name: value / form for name, (value, form) in pairs.items() if math.isfinite(value) and math.isfinite(form)}


def _times(evaluation: Evaluation, factors: Mapping[str, float]) -> Evaluation:
    figures = dict(evaluation.figures)
    for name, factor in factors.items():
        figure = figures[name]
        figures[name] = Prediction(figure.value * factor, figure.low * factor, figure.high * factor)
    return replace(evaluation, figures=figures, corrections=factors)


def _judged(evaluation: Evaluation, slo: SLO, rate: float) -> Evaluation:
    """Of a closed form: it keeps the SLO if it does so up to this rate at least."""
    if evaluation.curve is None:
        return evaluation
    capacity = evaluation.curve.capacity(slo, evaluation.deployment.pools[0].count, evaluation.corrections)
    figures = {**evaluation.figures, "capacity": capacity}
    return replace(evaluation, figures=figures, meets_slo=capacity.low >= rate)


def _with_capacity(simulated: Evaluation, slo: SLO, rate: float) -> Evaluation:
    """Where only one rate was simulated, the curve says how far it is to the last one that is kept."""
    if simulated.curve is None or len(simulated.simulated) > 1:
        return simulated
    found = simulated.curve.capacity(slo, simulated.deployment.pools[0].count, simulated.corrections)
    low = max(found.low, rate) if simulated.meets_slo else min(found.low, rate * _JUST_BELOW)
    value = max(found.value, low)
    figures = {**simulated.figures, "capacity": Prediction(value, low, max(found.high, value))}
    return replace(simulated, figures=figures)
