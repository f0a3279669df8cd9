"""Why this plan: what binds, what one device less would break, what a cheaper or faster choice gives up, and what would
change the choice. Sentences, made from the figures of what was evaluated and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from powerband.cost.projections import UNDIVIDED_BLOCKS
from powerband.planner.report.formatting import (
    BOUND_WORDS,
    banded_seconds,
    brief_seconds,
    deployment_text,
    dollars,
)
from powerband.planner.results import Evaluation, Pruned
from powerband.spec.deployment import Deployment
from powerband.spec.slo import SLO

_LARGEST = 3  # operators that are named
_LIMITED = ("ttft", "tpot", "e2e")


def reasons(
    recommended: Evaluation | None,
    evaluations: Sequence[Evaluation],
    alternatives: Mapping[str, Evaluation],
    *,
    slo: SLO,
    rate: float,
    budget_usd_per_h: float | None,
    unit: str = "requests/s",
    unpriced: Sequence[str] = (),
    pruned: Sequence[Pruned] = (),
) -> tuple[str, ...]:
    """evaluations: all of them. alternatives: 'cheaper', 'faster', 'nearest', see PlanResults. unit: of rates.

    unpriced: devices of which no price is known. pruned: what was left out.
    """
    if recommended is None:
        return tuple(_none(evaluations, alternatives.get("nearest"), slo, rate, budget_usd_per_h, pruned))
    return (
        _binding(recommended),
        *_smaller(recommended, evaluations, slo, rate),
        *_cheaper(recommended, alternatives.get("cheaper"), slo, rate),
        *_faster(recommended, alternatives.get("faster")),
        *_changing(recommended, evaluations, f"{rate:.3g}", unit),
        *_uncompared(recommended, evaluations, unpriced),
    )


def _binding(chosen: Evaluation) -> str:
    largest = list(chosen.operators.items())[:_LARGEST]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in largest)
    return f"What binds is {BOUND_WORDS[chosen.binds]}; a replica's time goes into {shares}."


def _smaller(chosen: Evaluation, evaluations: Sequence[Evaluation], slo: SLO, rate: float) -> Iterator[str]:
    """The same with a replica less."""
    fewer = _one_less(chosen, evaluations)
    if fewer is not None and not fewer.meets_slo:
        count = fewer.deployment.pools[0].count
        yield f"{count} of these replicas would not do: {_misses(fewer, slo, rate)}."


def _one_less(chosen: Evaluation, evaluations: Sequence[Evaluation]) -> Evaluation | None:
    pools = chosen.deployment.pools
    if len(pools) != 1 or pools[0].count == 1:
        return None
    for other in evaluations:
        theirs = other.deployment.pools
        is_same = other.deployment.engine == chosen.deployment.engine and len(theirs) == 1
        if is_same and theirs[0].replica == pools[0].replica and theirs[0].count == pools[0].count - 1:
            return other
    return None


def _cheaper(chosen: Evaluation, cheaper: Evaluation | None, slo: SLO, rate: float) -> Iterator[str]:
    if cheaper is None or chosen.usd_per_hour is None or cheaper.usd_per_hour is None:
        return
    saved = chosen.usd_per_hour - cheaper.usd_per_hour
    gives_up = _misses(cheaper, slo, rate) if not cheaper.meets_slo else _slower(chosen, cheaper)
    yield f"Cheaper: {deployment_text(cheaper.deployment)} saves {dollars(saved)} an hour, but {gives_up}."


def _faster(chosen: Evaluation, faster: Evaluation | None) -> Iterator[str]:
    if faster is None:
        return
    price = ""
    if chosen.usd_per_hour and faster.usd_per_hour:
        times = faster.usd_per_hour / chosen.usd_per_hour
        price = f", for {times:.3g} times the price" if times > 1.005 else ", at the same price"
    gains = [
        f"{name.upper()} {brief_seconds(ours.value)} → {brief_seconds(theirs.value)}"
        for name in ("ttft", "tpot")
        if (ours := chosen.figures.get(f"{name}_s")) and (theirs := faster.figures.get(f"{name}_s"))
    ]
    yield f"Faster: {deployment_text(faster.deployment)} ({', '.join(gains)}){price}."


def _changing(chosen: Evaluation, evaluations: Sequence[Evaluation], asked: str, unit: str) -> Iterator[str]:
    """The rate up to which it holds, and the price at which another kind of device would be chosen."""
    capacity = chosen.figures.get("capacity")
    if capacity is not None and capacity.low > 0:
        yield (
            f"It holds at least {capacity.low:.3g} {unit} (prediction {capacity.value:.3g}, asked {asked}); beyond "
            "that, plan again."
        )
    devices = _devices(chosen.deployment)
    others = [
        other
        for other in evaluations
        if other.meets_slo and other.usd_per_hour and not _devices(other.deployment) & devices
    ]
    if not others or not chosen.usd_per_hour:
        return
    nearest = min(others, key=lambda other: other.usd_per_hour or 0.0)
    share = chosen.usd_per_hour / (nearest.usd_per_hour or 1.0)
    if share < 1:
        yield (
            f"{deployment_text(nearest.deployment)} would be as cheap if its price fell by {1 - share:.0%} "
            f"(from {dollars(nearest.usd_per_hour)} to {dollars(chosen.usd_per_hour)} an hour)."
        )


def _uncompared(chosen: Evaluation, evaluations: Sequence[Evaluation], unpriced: Sequence[str]) -> Iterator[str]:
    """Devices that could have been chosen, if their price were known."""
    able = {
        device
        for one in evaluations
        if one.meets_slo and one.usd_per_hour is None
        for device in _devices(one.deployment)
    }
    names = [name for name in unpriced if name in able]
    if not names or (chosen.usd_per_hour is None and len({*names, *_devices(chosen.deployment)}) == 1):
        return
    rest = "they are" if len(names) > 1 else "it is"
    yield (
        f"No price of {' and '.join(names)} is known: {rest} chosen only where nothing with a price would do. "
        f"--set {names[0]}.price=DOLLARS or --prices gives one."
    )


def _devices(deployment: Deployment) -> set[str]:
    return {pool.replica.device for pool in deployment.pools}


def _none(
    evaluations: Sequence[Evaluation],
    nearest: Evaluation | None,
    slo: SLO,
    rate: float,
    budget_usd_per_h: float | None,
    pruned: Sequence[Pruned],
) -> Iterator[str]:
    meeting = [e for e in evaluations if e.meets_slo and e.usd_per_hour is not None]
    if meeting and budget_usd_per_h is not None:
        cheapest = min(meeting, key=lambda e: e.usd_per_hour or 0.0)
        yield (
            f"The budget of {dollars(budget_usd_per_h)} an hour is too small: the cheapest deployment that keeps the "
            f"SLO is {deployment_text(cheapest.deployment)} at {dollars(cheapest.usd_per_hour)}."
        )
        return
    if nearest is not None:
        yield f"Nearest is {deployment_text(nearest.deployment)}: {_misses(nearest, slo, rate)}."
        yield f"What binds most of its time is {BOUND_WORDS[nearest.binds]}."
    undivided = [one for one in pruned if one.reason.startswith(UNDIVIDED_BLOCKS)]
    if undivided:  # the most ranks come last
        reason = undivided[-1].reason
        yield f"With tensor parallelism it would be faster, but the checkpoint does not allow it: {reason}."


def _misses(evaluation: Evaluation, slo: SLO, rate: float) -> str:
    """How the SLO is missed, or could be at the pessimistic edge."""
    found = []
    for name in _LIMITED:
        limit, figure = slo.limits.get(name), evaluation.figures.get(f"{name}_s")
        if limit is None or figure is None or figure.high <= limit:
            continue
        shown, allowed = banded_seconds(figure), brief_seconds(limit)
        if figure.value > limit:
            found.append(f"{name.upper()} would be {shown} of {allowed}")
        else:
            high = brief_seconds(figure.high)
            found.append(f"{name.upper()} is predicted as {shown}, and {high} would be more than {allowed}")
    capacity = evaluation.figures.get("capacity")
    if not found and capacity is not None and capacity.low < rate:
        found.append(f"it holds {capacity.low:.3g} of the {rate:.3g} asked")
    attainment = evaluation.figures.get("attainment")
    if not found and attainment is not None:
        found.append(f"{attainment.low:.0%} of requests keep the SLO, {slo.attainment:.0%} must")
    return " and ".join(found) or "the SLO is kept too narrowly to promise it"


def _slower(chosen: Evaluation, other: Evaluation) -> str:
    for name in _LIMITED:
        ours, theirs = chosen.figures.get(f"{name}_s"), other.figures.get(f"{name}_s")
        if ours is not None and theirs is not None and theirs.value > ours.value * 1.05:
            return f"{name.upper()} rises from {brief_seconds(ours.value)} to {brief_seconds(theirs.value)}"
    return "it is nearer to its limit"
