"""What simulations say of closed forms, applied to those that were not simulated: so that figures can be compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from powerband.planner.results import Evaluation, Prediction
from powerband.spec.deployment import Deployment

_CORRECTED = ("ttft_s", "ttft_mean_s", "tpot_s", "tpot_mean_s", "e2e_mean_s")
_MIN_SIMULATED = 3


def corrected(evaluations: Sequence[Evaluation], before: Mapping[Deployment, Evaluation]) -> list[Evaluation]:
    """before: the closed form of every deployment. Latencies of closed forms, times the median ratio of simulated ones
    to theirs.
    """
    factors = _factors([e for e in evaluations if e.method == "simulation"], before)
    return [e if e.method == "simulation" else _times(e, factors) for e in evaluations]


def _factors(simulated: Sequence[Evaluation], before: Mapping[Deployment, Evaluation]) -> dict[str, float]:
    found = {}
    for name in _CORRECTED:
        ratios = [
            e.figures[name].value / before[e.deployment].figures[name].value
            for e in simulated
            if math.isfinite(e.figures[name].value) and math.isfinite(before[e.deployment].figures[name].value)
        ]
        if len(ratios) >= _MIN_SIMULATED:
            found[name] = median(ratios)
    return found


def _times(evaluation: Evaluation, factors: Mapping[str, float]) -> Evaluation:
    figures = dict(evaluation.figures)
    for name, factor in factors.items():
        figure = figures[name]
        figures[name] = Prediction(figure.value * factor, figure.low * factor, figure.high * factor)
    return replace(evaluation, figures=figures)
