"""The highest load at which a server still keeps its SLO: several loads one after the other, each an honest run of its
own. The rate is doubled until the SLO is missed, and the bracket is then halved.

A trial that is lost is stopped early by a sequential test; one that is won always runs to its end, because a queue that
grows slowly looks well for a while.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from powerband.bench.client.messages import Sample
from powerband.bench.load import Live, LoadResult, steady_window
from powerband.bench.saturation import is_saturated
from powerband.errors import UsageError
from powerband.metrics.figures import Summary, summarize
from powerband.metrics.slo import slo_misses
from powerband.metrics.statistics import wilson
from powerband.spec.quantities import count_text
from powerband.spec.slo import SLO

RESOLUTION = 1.05  # the bracket's width at which the search ends
MIN_REQUESTS = 40  # requests of a load, for its verdict to mean something
_MAX_DOUBLINGS = 12
_CONFIRMATIONS = 2
_STEPS_BACK = 15  # by RESOLUTION each, to half the rate: one that was met by luck is given up
_TRIES = 3  # of a load that turns out invalid: the client may have been disturbed just then
# A lost trial is given up when this likelihood ratio speaks for twice the misses that the target allows. Under the
# target the ratio is a martingale, so that it is ever this large with a probability of at most 1 % (Ville 1939).
_GIVE_UP = math.log(100)
_MIN_TO_GIVE_UP = 20  # requests

Verdict = Literal["met", "missed", "saturated", "invalid"]
Run = Callable[[float, int, Callable[[Live], bool] | None], Awaitable[LoadResult]]  # rate, seed, stop


@dataclass(frozen=True, slots=True)
class Trial:
    """One load at one rate."""

    rate: float
    seed: int
    result: LoadResult
    summary: Summary
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class CapacityResult:
    """The highest rate that meets the SLO."""

    rate: float  # 0: none did
    # From the highest rate that certainly meets the SLO to the lowest that certainly does not, at 95 % each.
    interval: tuple[float, float]
    attainment: float  # of all trials at `rate`
    attainment_interval: tuple[float, float]
    trials: tuple[Trial, ...]


class Searcher:
    """Runs trials and judges them. shown: called with each trial as it ends. Fractions as in load.steady_window."""

    def __init__(
        self, run: Run, slo: SLO, *, seed: int, warm_up: float, cool_down: float, shown: Callable[[Trial], object]
    ) -> None:
        if not slo.limits:
            raise UsageError("A rate can only be found for an SLO.", hint="Give one: --slo ttft=500ms,tpot=50ms.")
        self._run, self._slo, self._seed, self._shown = run, slo, seed, shown
        self._warm_up, self._cool_down = warm_up, cool_down
        self.trials: list[Trial] = []

    async def find_rate(self, first: float) -> CapacityResult:
        """first: the rate to begin with. Raises UsageError when the client cannot drive the load that it would take."""
        low, high = await self._bracket(first)
        while low > 0 and high / low > RESOLUTION:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if await self._is_met(middle) else (low, middle)
        for _ in range(_STEPS_BACK):
            if low == 0 or await self._is_confirmed(low):
                return self._found(low)
            low /= RESOLUTION
        return self._found(0.0)

    async def _bracket(self, first: float) -> tuple[float, float]:
        """A rate that is met (0: none was) and one that is not, a factor of 2 apart."""
        rate = first
        if await self._is_met(rate):
            for _ in range(_MAX_DOUBLINGS):
                if not await self._is_met(rate * 2):
                    return rate, rate * 2
                rate *= 2
            raise UsageError(f"The SLO is kept even at {rate:g} requests a second.", hint="Begin with a higher --rate.")
        while not self._is_too_short(self.trials[-1].result, 2):
            if await self._is_met(rate / 2):
                return rate / 2, rate
            rate /= 2
        return 0.0, rate

    async def _is_met(self, rate: float) -> bool:
        for _ in range(_TRIES):
            trial = await self._trial(rate, self._seed, self._is_lost)
            if self._is_too_short(trial.result, 1):
                number = trial.result.schedule.num_requests
                raise UsageError(
                    f"At {rate:.3g} requests a second a load has {count_text(number, 'request')}: too few to judge.",
                    hint=f"Make loads longer: --duration {math.ceil(MIN_REQUESTS / rate)}s.",
                    param="duration",
                )
            if trial.verdict != "invalid":
                return trial.verdict == "met"
        raise UsageError(
            f"This client cannot drive {rate:.4g} requests a second: {trial.summary.client_fault}.",
            hint="Give it more processes (--workers), or run it on a machine of its own.",
        )

    @staticmethod
    def _is_too_short(result: LoadResult, factor: int) -> bool:
        """Whether a load of so many times fewer requests would be."""
        return result.schedule.num_requests < MIN_REQUESTS * factor

    async def _is_confirmed(self, rate: float) -> bool:
        """By more trials with other seeds, all taken together."""
        for number in range(1, _CONFIRMATIONS + 1):
            await self._trial(rate, self._seed + number, None)
        good, scheduled = self._counts(rate)
        return scheduled > 0 and good >= self._slo.attainment * scheduled

    async def _trial(self, rate: float, seed: int, stop: Callable[[Live], bool] | None) -> Trial:
        result = await self._run(rate, seed, stop)
        records = [sample.record() for sample in result.samples]
        window = steady_window(result.samples, self._warm_up, self._cool_down)
        summary = summarize(records, window, self._slo)
        verdict: Verdict = "met"
        if summary.client_fault:
            verdict = "invalid"
        elif result.stopped or not summary.attainment or summary.attainment < self._slo.attainment:
            verdict = "missed"
        elif is_saturated(records, window):
            verdict = "saturated"
        trial = Trial(rate, seed, result, summary, verdict)
        self.trials.append(trial)
        self._shown(trial)
        return trial

    def _is_lost(self, live: Live) -> bool:
        """Wald's likelihood ratio of twice the allowed misses against the allowed ones."""
        return missed_slo_time_s(live.samples, self._slo) >= _GIVE_UP

    def _counts(self, rate: float) -> tuple[int, int]:
        at_rate = [trial.summary for trial in self.trials if trial.rate == rate and trial.verdict != "invalid"]
        return sum(summary.good for summary in at_rate), sum(summary.judged for summary in at_rate)

    def _found(self, rate: float) -> CapacityResult:
        surely_met, surely_missed = 0.0, math.inf
        for tried in {trial.rate for trial in self.trials}:
            low, high = wilson(*self._counts(tried))
            if low >= self._slo.attainment:
                surely_met = max(surely_met, tried)
            elif high < self._slo.attainment or any(t.result.stopped for t in self.trials if t.rate == tried):
                surely_missed = min(surely_missed, tried)
        good, scheduled = self._counts(rate)
        attainment = good / scheduled if scheduled else 0.0
        interval = min(surely_met, rate), max(surely_missed, rate)
        return CapacityResult(rate, interval, attainment, wilson(good, scheduled), tuple(self.trials))


def missed_slo_time_s(samples: Sequence[Sample], slo: SLO) -> float:
    """The logarithm of the likelihood ratio: how much likelier the outcomes are if twice as many miss as may."""
    verdicts = [verdict for s in samples if (verdict := slo_misses(s.record(), slo)) is not None]
    total = len(verdicts)
    if total < _MIN_TO_GIVE_UP:
        return 0.0
    bad = sum(map(bool, verdicts))
    allowed = max(1 - slo.attainment, 1e-6)
    twice = min(2 * allowed, (1 + allowed) / 2)
    return bad * math.log(twice / allowed) + (total - bad) * math.log((1 - twice) / (1 - allowed))
