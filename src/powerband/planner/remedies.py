"""Where nothing keeps the SLO: the rate at which the nearest deployment would, and the SLO that it would keep.

Both are simulated at the slow edge of the band before they are named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from powerband.planner.plan_request import PlanRequest
from powerband.planner.results import Evaluation
from powerband.planner.simulation.task import SimulationSummary
from powerband.spec.quantities import shown_seconds
from powerband.spec.slo import SLO

_MIN_RATE_RATIO = 1 / 64  # of the asked rate: below, no rate is named
_BISECTIONS = 4
_MARGINS = (1.1, 1.3, 1.6, 2.0)  # over each figure alone: all limits must be met by the same requests

Simulate = Callable[[PlanRequest, float], SimulationSummary]  # the nearest deployment at a rate, at the slow edge


def remedies(plan_request: PlanRequest, nearest: Evaluation, simulate: Simulate) -> Iterator[str]:
    """Sentences with the options that would do."""
    rate = _kept_rate(plan_request, nearest.figures["capacity"].low, simulate)
    if rate is not None:
        yield f"At {rate:g} of the {plan_request.rate:g} requests/s it would: --rate {rate:g}"
    slo = _kept_slo(plan_request, simulate)
    if slo is not None:
        limits = ",".join(
            f"{name}={shown_seconds(limit)}@p{100 * slo.attainment:g}" for name, limit in slo.limits.items()
        )
        yield f"At {plan_request.rate:g} requests/s this SLO would be kept: --slo {limits}"
    yield "Or offer other devices (--devices)."


def meets_slo(plan_request: PlanRequest, simulated: SimulationSummary) -> bool:
    return simulated.keeps_up and simulated.figures["attainment"] >= plan_request.slo.attainment


def _kept_rate(plan_request: PlanRequest, guess: float, simulate: Simulate) -> float | None:
    """The highest rate found below the asked one, in two digits; None: not even a small part of it is kept."""
    missed, least = plan_request.rate, plan_request.rate * _MIN_RATE_RATIO
    rate = _rounded_down(min(max(guess, least), 0.9 * missed))
    kept = 0.0
    for _ in range(_BISECTIONS):
        if meets_slo(plan_request, simulate(plan_request, rate)):
            kept = rate
        elif kept == 0.0 and rate <= least:
            return None
        else:
            missed = rate
        rate = _rounded_down(math.sqrt(kept * missed) if kept else max(missed / 4, least))
        if rate in (kept, missed):
            break
    return kept or None


def _kept_slo(plan_request: PlanRequest, simulate: Simulate) -> SLO | None:
    """None: the queue grows at this rate, whatever the limits."""
    found = simulate(plan_request, plan_request.rate)
    limits = {name: (limit, found.figures.get(f"{name}_s")) for name, limit in plan_request.slo.limits.items()}
    if not found.keeps_up or any(figure is None for _, figure in limits.values()):
        return None
    for margin in _MARGINS:
        wider = {
            f"{name}_s": max(limit, _rounded_up(margin * (figure or 0.0))) for name, (limit, figure) in limits.items()
        }
        asked = replace(plan_request, slo=replace(plan_request.slo, **wider))
        if asked.slo != plan_request.slo and meets_slo(asked, simulate(asked, plan_request.rate)):
            return asked.slo
    return None


def _rounded_down(value: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.floor(value / unit + 1e-9) * unit:.2g}")


def _rounded_up(value: float) -> float:
    if value <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.3g}")
