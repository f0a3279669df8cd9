"""The search: closed form for all, simulation for what could be chosen, and the rate up to which the choice holds.

kinds × limits × counts ── closed form ──► all evaluations ── the best, not yet simulated ──► simulations
                                                 ▲────────────── in rounds, until no better one is left ──┘
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from powerband.errors import UsageError
from powerband.planner.candidates import option_name, replica_options
from powerband.planner.correction import corrected
from powerband.planner.curve_sampling import with_curves
from powerband.planner.estimates import LIMITS, estimate, no_room_text, replica_counts, sized_replicas
from powerband.planner.mixed_pools import mixed_deployments
from powerband.planner.picked import only_picked
from powerband.planner.plan_request import PlanRequest, mean_turns, request_tokens
from powerband.planner.remedies import meets_slo, remedies
from powerband.planner.report.formatting import deployment_text
from powerband.planner.report.reasons import reasons
from powerband.planner.report.table import pruned_by_reason
from powerband.planner.results import Bound, Evaluation, PlanResults, Prediction, Pruned, SimulatedRate
from powerband.planner.selection import alternatives, have_one_price, marked, order, price, recommended, within_budget
from powerband.planner.simulation.task import MAX_REPLICAS, SimulationSummary, SimulationTask, run_simulation_task
from powerband.spec.deployment import Deployment
from powerband.spec.workload.workload import RequestMix

Progress = Callable[[int, int, str], object]  # done, of how many, of what

_SAMPLED_REQUESTS = 2000  # requests by which the workload is weighed
_MAX_SIMULATED = 64  # deployments
_PER_PRICE = 3  # of one price that are simulated
_FRONTIER_SIMULATED = 6  # that are simulated besides, so that the frontier shows more than closed forms
_BATCH = 4
_MAX_RECHECKS = 3  # times that others of the same price are looked at, when simulations have told how closed forms err
_MAX_ALTERNATIVE_ROUNDS = 6  # times that alternatives are looked for anew, because simulated they are none
_MAX_CAPACITY_ROUNDS = 2  # deployments whose highest rate is simulated
_SECONDS, _ANSWERS = 60.0, 5.0  # a simulation lasts so long at least, and so many mean answers
_MIN_REQUESTS, _MAX_REQUESTS = 150, 1200  # requests
_MEMORY_BINDS = 0.2  # of the steps someone waits for blocks
_BISECTIONS = 5  # to find the highest rate
_MAX_RATE_RATIO = 8.0  # times the asked one: what holds that is not asked for more


def search(plan_request: PlanRequest, *, workers: int | None = None, progress: Progress | None = None) -> PlanResults:
    """workers: processes; default: one for each core. Raises UsageError when no deployment fits at all."""
    started_s = time.monotonic()
    report: Progress = progress or (lambda _done, _total, _text: None)
    found, pruned = replica_options(plan_request.spec, plan_request.stored, plan_request.space)
    if not found:
        raise _nothing_fits(plan_request, pruned)
    schedule = plan_request.schedule(plan_request.rate, _SAMPLED_REQUESTS)
    requests, turns = request_tokens(schedule), mean_turns(schedule)
    evaluations, sized = [], []
    for unit in sized_replicas(plan_request, found, requests, turns):
        sized.append(unit)
        counts = replica_counts(plan_request, unit)
        evaluations += [estimate(plan_request, unit, count) for count in counts]
        if not counts:
            pruned.append(Pruned(option_name(unit.kind.engine, unit.replica), no_room_text(plan_request, unit.replica)))
        report(len(sized), len(LIMITS) * len(found), "closed form")
    evaluations += mixed_deployments(plan_request, sized, requests, turns)
    if not evaluations:
        raise _nothing_fits(plan_request, pruned)
    evaluations = only_picked(plan_request.pick, evaluations)
    report(0, _MAX_SIMULATED, f"simulating, first estimate: {_best_text(plan_request, evaluations)}")
    before = {evaluation.deployment: evaluation for evaluation in evaluations}
    with _worker_pool(plan_request, workers) as simulate_all:
        simulated = _SimulationRounds(plan_request, simulate_all, report)
        evaluations = simulated.rounds(evaluations)
        evaluations = simulated.frontier(marked(evaluations))
        evaluations = simulated.recheck(evaluations, before)
        evaluations = simulated.others(evaluations)
        evaluations, best = simulated.choice(evaluations)
    evaluations = with_curves(plan_request, evaluations, sized)
    evaluations = corrected(evaluations, before, plan_request.slo, plan_request.rate)
    evaluations = marked(evaluations, _same(best, evaluations))
    evaluations = sorted(evaluations, key=lambda e: (not e.meets_slo, order(plan_request.objective, e)))
    chosen = _same(best, evaluations)
    others = alternatives(plan_request, chosen, evaluations)
    found_in_all = PlanResults(
        model=plan_request.model,
        objective=plan_request.objective,
        rate=plan_request.rate,
        slo=plan_request.slo,
        budget_usd_per_hour=plan_request.budget_usd_per_h,
        price_origins={price.where: price.origin for profile in plan_request.profiles for price in profile.prices},
        workload=plan_request.workload.as_dict(),
        evaluations=tuple(evaluations),
        pruned=tuple(pruned),
        recommended=chosen,
        alternatives=others,
        cut=schedule.cut_text,
        seconds=time.monotonic() - started_s,
    )
    return replace(found_in_all, reasons=tuple(_why(plan_request, found_in_all, report)))


def _same(one: Evaluation | None, evaluations: Sequence[Evaluation]) -> Evaluation | None:
    return next((each for each in evaluations if one is not None and each.deployment == one.deployment), None)


def _why(plan_request: PlanRequest, results: PlanResults, report: Progress) -> Iterator[str]:
    yield from reasons(
        results.recommended,
        results.evaluations,
        results.alternatives,
        slo=plan_request.slo,
        rate=plan_request.rate,
        budget_usd_per_h=plan_request.budget_usd_per_h,
        unit=results.unit,
        unpriced=[profile.name for profile in plan_request.profiles if not profile.prices],
        pruned=results.pruned,
    )
    nearest = results.alternatives.get("nearest")
    if results.recommended is None and nearest is not None and not _only_budget(plan_request, results.evaluations):
        report(_MAX_SIMULATED, _MAX_SIMULATED, "nothing keeps the SLO: looking for what would")
        yield from remedies(plan_request, nearest, partial(_simulate_slow, nearest))


def _only_budget(plan_request: PlanRequest, evaluations: Sequence[Evaluation]) -> bool:
    """Whether nothing but the budget is missed."""
    return plan_request.budget_usd_per_h is not None and any(one.meets_slo for one in evaluations)


def _simulate_slow(one: Evaluation, plan_request: PlanRequest, rate: float) -> SimulationSummary:
    """At the slow edge of its band."""
    task = _task(plan_request, one, rate)
    return run_simulation_task(plan_request, replace(task, slowdown=1 + _band(plan_request, one.deployment)))


def _best_text(plan_request: PlanRequest, evaluations: Sequence[Evaluation]) -> str:
    """What would be recommended: of what was simulated, or else by estimates alone."""
    able = [e for e in evaluations if e.meets_slo and within_budget(plan_request, e)]
    best = recommended(plan_request, evaluations) or min(
        able, key=lambda e: order(plan_request.objective, e), default=None
    )
    return "nothing keeps the SLO" if best is None else deployment_text(best.deployment)


Simulate = Callable[[Iterable[SimulationTask]], Iterator[SimulationSummary]]


@contextmanager
def _worker_pool(plan_request: PlanRequest, workers: int | None) -> Iterator[Simulate]:
    """Tasks in, what was played out, in their order."""
    workers = workers or len(os.sched_getaffinity(0))
    one = partial(run_simulation_task, plan_request)
    if workers == 1:
        yield partial(map, one)
        return
    context = multiprocessing.get_context("spawn")  # this process may have threads: a fork would copy their locks
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            yield partial(pool.map, one)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@dataclass(slots=True)
class _SimulationRounds:
    """Simulates evaluations, and remembers which."""

    plan_request: PlanRequest
    simulate_all: Simulate
    report: Progress

    def rounds(self, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
        """The best ones by the objective, until no better one is left that could keep the SLO."""
        by_deployment = {evaluation.deployment: evaluation for evaluation in evaluations}
        done = 0
        while done < _MAX_SIMULATED:
            batch = self._next(list(by_deployment.values()))
            if not batch:
                break
            for evaluation in self.simulate(batch):
                by_deployment[evaluation.deployment] = evaluation
            done += len(batch)
            self.report(
                done, _MAX_SIMULATED, f"simulating, so far: {_best_text(self.plan_request, [*by_deployment.values()])}"
            )
        return list(by_deployment.values())

    def frontier(self, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
        """Some of what nothing beats, evenly spread over the prices."""
        edge = sorted((e for e in evaluations if not e.dominated and e.method != "simulation"), key=price)
        chosen = edge[:: max(len(edge) // _FRONTIER_SIMULATED, 1)][:_FRONTIER_SIMULATED]
        simulated = {evaluation.deployment: evaluation for evaluation in self.simulate(chosen)}
        return [simulated.get(evaluation.deployment, evaluation) for evaluation in evaluations]

    def recheck(self, evaluations: Sequence[Evaluation], before: Mapping[Deployment, Evaluation]) -> list[Evaluation]:
        """What would be better than the choice at its price, if closed forms erred with it as with the others."""
        by_deployment = {evaluation.deployment: evaluation for evaluation in evaluations}
        for _ in range(_MAX_RECHECKS):
            best = recommended(self.plan_request, list(by_deployment.values()))
            if best is None:
                break
            limit = order(self.plan_request.objective, best)
            better = [
                evaluation
                for evaluation in corrected(
                    list(by_deployment.values()), before, self.plan_request.slo, self.plan_request.rate
                )
                if evaluation.method != "simulation"
                and evaluation.figures["capacity"].high >= self.plan_request.rate
                and have_one_price(evaluation, best)
                and order(self.plan_request.objective, evaluation) < limit
            ]
            if not better:
                break
            better.sort(key=lambda evaluation: order(self.plan_request.objective, evaluation))
            found = self.simulate([by_deployment[evaluation.deployment] for evaluation in better[:_BATCH]])
            by_deployment |= {evaluation.deployment: evaluation for evaluation in found}
        return list(by_deployment.values())

    def others(self, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
        """What lies beside the choice: figures of a closed form are not to be held against simulated ones."""
        by_deployment = {evaluation.deployment: evaluation for evaluation in evaluations}
        for _ in range(_MAX_ALTERNATIVE_ROUNDS):
            known = list(by_deployment.values())
            found = alternatives(self.plan_request, recommended(self.plan_request, known), known)
            pending = [evaluation for evaluation in found.values() if evaluation.method != "simulation"]
            if not pending:
                break
            by_deployment |= {evaluation.deployment: evaluation for evaluation in self.simulate(pending)}
        return list(by_deployment.values())

    def choice(self, evaluations: Sequence[Evaluation]) -> tuple[list[Evaluation], Evaluation | None]:
        """The best one, by highest rates that are simulated: another that is alike may hold more."""
        found = list(evaluations)
        best = recommended(self.plan_request, found)
        for _ in range(_MAX_CAPACITY_ROUNDS):
            found = self.capacity(found, best)
            again = recommended(self.plan_request, found)
            if again is None or best is None or again.deployment == best.deployment:
                return found, again
            best = again
        return found, recommended(self.plan_request, [one for one in found if len(one.simulated) > 1])

    def capacity(self, evaluations: Sequence[Evaluation], chosen: Evaluation | None) -> list[Evaluation]:
        """The choice's highest rate, as predicted and at both edges, by simulation."""
        # A simulation of many conversations ends long before as many go on at once as there will be: for them the
        # closed form's rate stands, which knows no beginning.
        if chosen is None or mean_turns(self.plan_request.schedule(self.plan_request.rate, _MIN_REQUESTS)) > 1:
            return list(evaluations)
        found = self._with_highest_rates(chosen)
        return [found if evaluation.deployment == chosen.deployment else evaluation for evaluation in evaluations]

    def simulate(self, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
        """As predicted, and at the band's slow and fast edge."""
        tasks = []
        for evaluation in evaluations:
            band = _band(self.plan_request, evaluation.deployment)
            task = _task(self.plan_request, evaluation, self.plan_request.rate)
            tasks += [replace(task, slowdown=slowdown) for slowdown in (1.0, 1 + band, 1 / (1 + band))]
        simulated = list(self.simulate_all(tasks))
        return [
            _evaluate(self.plan_request, evaluation, *simulated[3 * i : 3 * i + 3])
            for i, evaluation in enumerate(evaluations)
        ]

    def _next(self, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
        plan_request = self.plan_request
        best = recommended(plan_request, evaluations)
        seen = Counter(_price_level(evaluation) for evaluation in evaluations if evaluation.method == "simulation")
        chosen: list[Evaluation] = []
        for evaluation in sorted(evaluations, key=lambda e: (not e.meets_slo, order(plan_request.objective, e))):
            if evaluation.method == "simulation" or not within_budget(plan_request, evaluation):
                continue
            if evaluation.figures["capacity"].high < plan_request.rate and plan_request.objective != "throughput":
                continue
            if best is not None and order(plan_request.objective, evaluation) >= order(plan_request.objective, best):
                continue
            level = _price_level(evaluation)
            if plan_request.objective == "cost" and seen[level] >= _PER_PRICE:
                continue
            seen[level] += 1
            chosen.append(evaluation)
            if len(chosen) == _BATCH:
                break
        return chosen

    def _with_highest_rates(self, chosen: Evaluation) -> Evaluation:
        """By bisection, for all three speeds at once: as predicted, and at the band's slow and fast edge."""
        band, asked, guess = (
            _band(self.plan_request, chosen.deployment),
            self.plan_request.rate,
            chosen.figures["capacity"],
        )
        speeds = (1.0, 1 + band, 1 / (1 + band))
        kept = [asked] * len(speeds)  # by the simulation of the choice
        missed = [math.inf] * len(speeds)
        simulated = list(chosen.simulated)
        rates = [
            min(max(first, asked * 1.1), asked * _MAX_RATE_RATIO) for first in (guess.value, guess.low, guess.high)
        ]
        for done in range(_BISECTIONS):
            tasks = [
                replace(_task(self.plan_request, chosen, rate), slowdown=slowdown)
                for rate, slowdown in zip(rates, speeds, strict=True)
            ]
            for i, one in enumerate(self.simulate_all(tasks)):
                if meets_slo(self.plan_request, one):
                    kept[i] = max(kept[i], rates[i])
                else:
                    missed[i] = min(missed[i], rates[i])
                if speeds[i] > 1:
                    simulated.append(SimulatedRate(rates[i], one.kept_limits))
                is_open = math.isinf(missed[i])
                rates[i] = min(kept[i] * 1.5, asked * _MAX_RATE_RATIO) if is_open else math.sqrt(kept[i] * missed[i])
            self.report(done + 1, _BISECTIONS, f"highest rate of {deployment_text(chosen.deployment)}")
        # Where all that was tried holds, the closed form's rate stands, except at the slow edge, which is promised.
        for i, estimated in ((0, guess.value), (2, guess.high)):
            if math.isinf(missed[i]):
                kept[i] = max(kept[i], estimated)
        figures = {**chosen.figures, "capacity": Prediction(*kept)}
        return replace(chosen, figures=figures, simulated=tuple(simulated))


def _evaluate(
    plan_request: PlanRequest,
    before: Evaluation,
    nominal: SimulationSummary,
    slow: SimulationSummary,
    fast: SimulationSummary,
) -> Evaluation:
    figures = dict(before.figures)
    for name, value in nominal.figures.items():
        others = [value, slow.figures.get(name, value), fast.figures.get(name, value)]
        figures[name] = Prediction(value, min(others), max(others))
    if not nominal.keeps_up:
        for name in ("ttft_s", "ttft_mean_s", "e2e_s", "e2e_mean_s"):
            figures[name] = Prediction(math.inf, figures[name].low, math.inf)
    capacity = figures["capacity"]
    if meets_slo(plan_request, slow):
        figures["capacity"] = Prediction(
            max(capacity.value, plan_request.rate), max(capacity.low, plan_request.rate), capacity.high
        )
    else:
        figures["capacity"] = Prediction(capacity.value, min(capacity.low, plan_request.rate * 0.99), capacity.high)
    return replace(
        before,
        method="simulation",
        figures=figures,
        meets_slo=meets_slo(plan_request, slow),
        binds=_bottleneck(before, nominal),
        operators=nominal.operators,
        simulated=(SimulatedRate(plan_request.rate, slow.kept_limits),),
    )


def _price_level(evaluation: Evaluation) -> tuple[bool, float]:
    unpriced, amount = price(evaluation)
    return unpriced, round(amount, 4)


def _bottleneck(before: Evaluation, simulated: SimulationSummary) -> Bound:
    if simulated.short_of_memory > _MEMORY_BINDS:
        return "memory"
    if not simulated.keeps_up or before.binds == "queueing":
        return "queueing"
    names: tuple[Bound, ...] = ("bandwidth", "compute", "link", "host")
    return max(names, key=lambda name: simulated.bounds.get(name, 0.0))


def _task(plan_request: PlanRequest, evaluation: Evaluation, rate: float) -> SimulationTask:
    """Long enough that the beginning does not count: of conversations, that some have come to their end."""
    replicas = sum(pool.count for pool in evaluation.deployment.pools)
    share = min(MAX_REPLICAS / replicas, 1.0)
    answer_s = evaluation.figures["e2e_mean_s"].value
    seconds = max(_SECONDS, _ANSWERS * answer_s if math.isfinite(answer_s) else 0.0)
    mix, turns = plan_request.workload.requests, 1.0
    if isinstance(mix, RequestMix) and mix.conversation is not None:
        turns = mix.conversation.turns.mean
        seconds = max(seconds, 2 * turns * (mix.conversation.think_s + seconds / _ANSWERS))
    max_requests = _MAX_REQUESTS if turns == 1 else 4 * _MAX_REQUESTS
    return SimulationTask(
        evaluation.deployment, rate, int(min(max(rate * turns * share * seconds, _MIN_REQUESTS), max_requests))
    )


def _band(plan_request: PlanRequest, deployment: Deployment) -> float:
    return max(plan_request.latency_model(pool.replica, deployment.engine).band for pool in deployment.pools)


def _nothing_fits(plan_request: PlanRequest, pruned: Sequence[Pruned]) -> UsageError:
    listed = "; ".join(
        f"{sum(one.count for one in members):,} × {members[0].reason} ({members[0].what})"
        for _, members in pruned_by_reason(pruned)
    )
    return UsageError(
        f"No deployment of {plan_request.model} is possible on these devices: {listed}.",
        hint="Offer larger or more devices (--devices, --max-devices), fewer --replicas, or another --quantization or "
        "--engine.",
        param="devices",
    )
