"""The search: closed form for all, simulation for what could be chosen, and the rate up to which the choice holds.

kinds × limits × counts ── closed form ──► all evaluations ── the best, not yet simulated ──► simulations
                                                 ▲────────────── in rounds, until no better one is left ──┘
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from powerband.cost.latency import LatencyModel
from powerband.errors import UsageError
from powerband.planner.candidates import kinds
from powerband.planner.correction import corrected
from powerband.planner.estimates import LIMITS, counts, estimated, units
from powerband.planner.formatting import deployment_text
from powerband.planner.mixed_pools import fleets
from powerband.planner.plan_request import PlanRequest, turns_of, weighed
from powerband.planner.reasons import reasons
from powerband.planner.results import Banded, Bound, Evaluation, PlanResults, Pruned
from powerband.planner.selection import alternatives, marked, order, price, recommended, within_budget
from powerband.planner.simulation_task import MAX_REPLICAS, SimulationSummary, SimulationTask, play
from powerband.spec.deployment import Deployment
from powerband.spec.workload import Mix

Progress = Callable[[int, int, str], object]  # done, of how many, of what

_WEIGHED = 2000  # requests by which the workload is weighed
_MOST_SIMULATED = 64  # deployments
_ALIKE = 3  # of one price that are simulated
_OF_FRONTIER = 6  # that are simulated besides, so that the frontier shows more than closed forms
_AT_ONCE = 4
_MOST_SURELY = 3  # times that others of the same price are looked at, when simulations have told how closed forms err
_SAME = 1e-3  # of a price
_MOST_BESIDE = 6  # times that alternatives are looked for anew, because simulated they are none
_SECONDS, _ANSWERS = 60.0, 5.0  # a simulation lasts so long at least, and so many mean answers
_FEWEST, _MOST = 150, 1200  # requests
_MEMORY_BINDS = 0.2  # of the steps someone waits for blocks
_BISECTIONS = 5  # to find the highest rate
_MOST_RATE = 8.0  # times the asked one: what holds that is not asked for more


def search(question: PlanRequest, *, workers: int | None = None, progress: Progress | None = None) -> PlanResults:
    """workers: processes; default: one for each core. Raises UsageError when no deployment fits at all."""
    started_s = time.monotonic()
    tell: Progress = progress or (lambda _done, _total, _text: None)
    found, pruned = kinds(question.spec, question.stored, question.space)
    if not found:
        raise _nothing_fits(question, pruned)
    schedule = question.schedule(question.rate, _WEIGHED)
    requests, turns = weighed(schedule), turns_of(schedule)
    evaluations, alike = [], []
    for unit in units(question, found, requests, turns):
        alike.append(unit)
        evaluations += [estimated(question, unit, count) for count in counts(question, unit)]
        tell(len(alike), len(LIMITS) * len(found), "closed form")
    evaluations += fleets(question, alike, requests, turns)
    tell(0, _MOST_SIMULATED, f"simulating, first estimate: {_best_text(question, evaluations)}")
    before = {evaluation.deployment: evaluation for evaluation in evaluations}
    with _players(question, workers) as players:
        simulated = _Simulated(question, players, tell)
        evaluations = simulated.rounds(evaluations)
        evaluations = simulated.frontier(marked(evaluations))
        evaluations = simulated.surely(evaluations, before)
        evaluations = simulated.beside(evaluations)
        evaluations = simulated.capacity(evaluations, recommended(question, evaluations))
    evaluations = corrected(evaluations, before)
    chosen = recommended(question, evaluations)
    evaluations = marked(evaluations, chosen)
    evaluations = sorted(evaluations, key=lambda e: (not e.meets_slo, order(question.objective, e)))
    chosen = recommended(question, evaluations)
    beside = alternatives(question, chosen, evaluations)
    found_in_all = PlanResults(
        model=question.model,
        objective=question.objective,
        rate=question.rate,
        slo=question.slo,
        budget_usd_per_hour=question.budget_usd_per_h,
        workload=question.workload.as_dict(),
        evaluations=tuple(evaluations),
        pruned=tuple(pruned),
        recommended=chosen,
        alternatives=beside,
        seconds=time.monotonic() - started_s,
    )
    why = reasons(
        chosen,
        evaluations,
        beside,
        slo=question.slo,
        rate=question.rate,
        budget_usd_per_h=question.budget_usd_per_h,
        unit=found_in_all.unit,
    )
    return replace(found_in_all, reasons=why)


def _best_text(question: PlanRequest, evaluations: Sequence[Evaluation]) -> str:
    """What would be recommended: of what was simulated, or else by estimates alone."""
    able = [e for e in evaluations if e.meets_slo and within_budget(question, e)]
    best = recommended(question, evaluations) or min(able, key=lambda e: order(question.objective, e), default=None)
    return "nothing keeps the SLO" if best is None else deployment_text(best.deployment)


Player = Callable[[Iterable[SimulationTask]], Iterator[SimulationSummary]]


@contextmanager
def _players(question: PlanRequest, workers: int | None) -> Iterator[Player]:
    """Tasks in, what was played out, in their order."""
    workers = workers or len(os.sched_getaffinity(0))
    one = partial(play, question)
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
class _Simulated:
    """Simulates evaluations, and remembers which."""

    question: PlanRequest
    players: Player
    tell: Progress

    def rounds(self, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
        """The best ones by the objective, until no better one is left that could keep the SLO."""
        by_deployment = {evaluation.deployment: evaluation for evaluation in evaluations}
        done = 0
        while done < _MOST_SIMULATED:
            batch = self._next(list(by_deployment.values()))
            if not batch:
                break
            for evaluation in self.simulate(batch):
                by_deployment[evaluation.deployment] = evaluation
            done += len(batch)
            self.tell(
                done, _MOST_SIMULATED, f"simulating, so far: {_best_text(self.question, [*by_deployment.values()])}"
            )
        return list(by_deployment.values())

    def frontier(self, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
        """Some of what nothing beats, evenly spread over the prices."""
        edge = sorted((e for e in evaluations if not e.dominated and e.method != "simulation"), key=price)
        chosen = edge[:: max(len(edge) // _OF_FRONTIER, 1)][:_OF_FRONTIER]
        played = {evaluation.deployment: evaluation for evaluation in self.simulate(chosen)}
        return [played.get(evaluation.deployment, evaluation) for evaluation in evaluations]

    def surely(self, evaluations: Sequence[Evaluation], before: Mapping[Deployment, Evaluation]) -> list[Evaluation]:
        """What would be better than the choice at its price, if closed forms erred with it as with the others."""
        by_deployment = {evaluation.deployment: evaluation for evaluation in evaluations}
        for _ in range(_MOST_SURELY):
            best = recommended(self.question, list(by_deployment.values()))
            if best is None:
                break
            limit = order(self.question.objective, best)
            better = [
                evaluation
                for evaluation in corrected(list(by_deployment.values()), before)
                if evaluation.method != "simulation"
                and evaluation.figures["capacity"].high >= self.question.rate
                and abs(price(evaluation) - price(best)) < _SAME * price(best)
                and order(self.question.objective, evaluation) < limit
            ]
            if not better:
                break
            better.sort(key=lambda evaluation: order(self.question.objective, evaluation))
            found = self.simulate([by_deployment[evaluation.deployment] for evaluation in better[:_AT_ONCE]])
            by_deployment |= {evaluation.deployment: evaluation for evaluation in found}
        return list(by_deployment.values())

    def beside(self, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
        """What lies beside the choice: figures of a closed form are not to be held against simulated ones."""
        by_deployment = {evaluation.deployment: evaluation for evaluation in evaluations}
        for _ in range(_MOST_BESIDE):
            known = list(by_deployment.values())
            found = alternatives(self.question, recommended(self.question, known), known)
            pending = [evaluation for evaluation in found.values() if evaluation.method != "simulation"]
            if not pending:
                break
            by_deployment |= {evaluation.deployment: evaluation for evaluation in self.simulate(pending)}
        return list(by_deployment.values())

    def capacity(self, evaluations: Sequence[Evaluation], chosen: Evaluation | None) -> list[Evaluation]:
        """The choice's highest rate, as predicted and at both edges, by simulation."""
        # A simulation of many conversations ends long before as many go on at once as there will be: for them the
        # closed form's rate stands, which knows no beginning.
        if chosen is None or turns_of(self.question.schedule(self.question.rate, _FEWEST)) > 1:
            return list(evaluations)
        edges = self._highest_rates(chosen)
        figures = {**chosen.figures, "capacity": Banded(*edges)}
        found = replace(chosen, figures=figures)
        return [found if evaluation.deployment == chosen.deployment else evaluation for evaluation in evaluations]

    def simulate(self, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
        """As predicted, and at the band's slow and fast edge."""
        tasks = []
        for evaluation in evaluations:
            band = _band(self.question, evaluation.deployment)
            task = _task(self.question, evaluation, self.question.rate)
            tasks += [replace(task, slowdown=slowdown) for slowdown in (1.0, 1 + band, 1 / (1 + band))]
        played = list(self.players(tasks))
        return [
            _judged(self.question, evaluation, *played[3 * i : 3 * i + 3]) for i, evaluation in enumerate(evaluations)
        ]

    def _next(self, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
        question = self.question
        best = recommended(question, evaluations)
        seen: dict[float, int] = {}
        for evaluation in evaluations:
            if evaluation.method == "simulation":
                seen[round(price(evaluation), 4)] = seen.get(round(price(evaluation), 4), 0) + 1
        chosen: list[Evaluation] = []
        for evaluation in sorted(evaluations, key=lambda e: (not e.meets_slo, order(question.objective, e))):
            if evaluation.method == "simulation" or not within_budget(question, evaluation):
                continue
            if evaluation.figures["capacity"].high < question.rate and question.objective != "throughput":
                continue
            if best is not None and order(question.objective, evaluation) >= order(question.objective, best):
                continue
            level = round(price(evaluation), 4)
            if question.objective == "cost" and seen.get(level, 0) >= _ALIKE:
                continue
            seen[level] = seen.get(level, 0) + 1
            chosen.append(evaluation)
            if len(chosen) == _AT_ONCE:
                break
        return chosen

    def _highest_rates(self, chosen: Evaluation) -> list[float]:
        """By bisection, for all three speeds at once: as predicted, and at the band's slow and fast edge."""
        band, asked, guess = _band(self.question, chosen.deployment), self.question.rate, chosen.figures["capacity"]
        speeds = (1.0, 1 + band, 1 / (1 + band))
        kept = [asked] * len(speeds)  # by the simulation of the choice
        missed = [math.inf] * len(speeds)
        rates = [min(max(first, asked * 1.1), asked * _MOST_RATE) for first in (guess.value, guess.low, guess.high)]
        for done in range(_BISECTIONS):
            tasks = [
                replace(_task(self.question, chosen, rate), slowdown=slowdown)
                for rate, slowdown in zip(rates, speeds, strict=True)
            ]
            for i, one in enumerate(self.players(tasks)):
                if _keeps(self.question, one):
                    kept[i] = max(kept[i], rates[i])
                else:
                    missed[i] = min(missed[i], rates[i])
                is_open = math.isinf(missed[i])
                rates[i] = min(kept[i] * 1.5, asked * _MOST_RATE) if is_open else math.sqrt(kept[i] * missed[i])
            self.tell(done + 1, _BISECTIONS, f"highest rate of {deployment_text(chosen.deployment)}")
        return kept


def _judged(
    question: PlanRequest,
    before: Evaluation,
    nominal: SimulationSummary,
    slow: SimulationSummary,
    fast: SimulationSummary,
) -> Evaluation:
    figures = dict(before.figures)
    for name, value in nominal.figures.items():
        others = [value, slow.figures.get(name, value), fast.figures.get(name, value)]
        figures[name] = Banded(value, min(others), max(others))
    if not nominal.keeps_up:
        for name in ("ttft_s", "ttft_mean_s", "e2e_s", "e2e_mean_s"):
            figures[name] = Banded(math.inf, figures[name].low, math.inf)
    capacity = figures["capacity"]
    if _keeps(question, slow):
        figures["capacity"] = Banded(
            max(capacity.value, question.rate), max(capacity.low, question.rate), capacity.high
        )
    else:
        figures["capacity"] = Banded(capacity.value, min(capacity.low, question.rate * 0.99), capacity.high)
    return replace(
        before,
        method="simulation",
        figures=figures,
        meets_slo=_keeps(question, slow),
        binds=_binds(before, nominal),
        operators=nominal.operators,
    )


def _keeps(question: PlanRequest, played: SimulationSummary) -> bool:
    return played.keeps_up and played.figures["attainment"] >= question.slo.attainment


def _binds(before: Evaluation, played: SimulationSummary) -> Bound:
    if played.short_of_memory > _MEMORY_BINDS:
        return "memory"
    if not played.keeps_up or before.binds == "queueing":
        return "queueing"
    names: tuple[Bound, ...] = ("bandwidth", "compute", "link", "host")
    return max(names, key=lambda name: played.bounds.get(name, 0.0))


def _task(question: PlanRequest, evaluation: Evaluation, rate: float) -> SimulationTask:
    """Long enough that the beginning does not count: of conversations, that some have come to their end."""
    replicas = sum(pool.count for pool in evaluation.deployment.pools)
    share = min(MAX_REPLICAS / replicas, 1.0)
    answer_s = evaluation.figures["e2e_mean_s"].value
    seconds = max(_SECONDS, _ANSWERS * answer_s if math.isfinite(answer_s) else 0.0)
    mix, turns = question.workload.requests, 1.0
    if isinstance(mix, Mix) and mix.conversation is not None:
        turns = mix.conversation.turns.mean
        seconds = max(seconds, 2 * turns * (mix.conversation.think_s + seconds / _ANSWERS))
    most = _MOST if turns == 1 else 4 * _MOST
    return SimulationTask(evaluation.deployment, rate, int(min(max(rate * turns * share * seconds, _FEWEST), most)))


def _band(question: PlanRequest, deployment: Deployment) -> float:
    return max(
        LatencyModel(question.spec, question.profile(pool.replica.device), pool.replica, deployment.engine).band
        for pool in deployment.pools
    )


def _nothing_fits(question: PlanRequest, pruned: Sequence[Pruned]) -> UsageError:
    listed = "; ".join(f"{one.what}: {one.reason}" for one in pruned[:4])
    return UsageError(
        f"No deployment of {question.model} is possible on these devices. {listed}.",
        hint="Offer larger or more devices (--devices, --max-devices), or another --quantization or --engine.",
        param="devices",
    )
