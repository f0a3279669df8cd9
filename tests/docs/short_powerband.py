"""`powerband` for the tests of the documentation: the same program, whose measurements take seconds instead of minutes.

Commands are typed as the pages say; only lengths that a user leaves to the program are shorter.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any


def shorten() -> None:
    from powerband import evaluation as pieces
    from powerband.bench import search as rate_search
    from powerband.bench import session
    from powerband.calibration import client_capacity, measure, quality
    from powerband.calibration import session as calibration
    from powerband.cli.model import eval as evaluation
    from powerband.cli.plan import calibrate
    from powerband.fleet import deployment
    from powerband.planner import candidates, estimates, search
    from powerband.spec.workload import options

    options.DEFAULT_DURATION_S = 3.0
    deployment.deploy_plan = _verified_shortly(deployment.deploy_plan)
    session.SWEEP = (0.5, 1.0)
    session._FULL_LOAD = 8
    rate_search.RESOLUTION, rate_search._CONFIRMATIONS, rate_search._STEPS_BACK = 1.9, 1, 1
    rate_search.Searcher._is_met, rate_search.Searcher._bracket = _is_met, _bracket
    session.BenchSession._single_user_rate = _at_least(session.BenchSession._single_user_rate, 2.0)
    session.BenchSession._max_rate = _at_least(session.BenchSession._max_rate, 4.0)
    client_capacity.RateRamp.__init__.__kwdefaults__ |= {"levels": 2, "level_s": 1.0}
    search._SECONDS, search._MIN_REQUESTS, search._SAMPLED_REQUESTS = 15.0, 40, 300
    search.LIMITS = estimates.LIMITS = estimates.LIMITS[:1]
    search._BISECTIONS, search._worker_pool = 2, _in_this_process(search._worker_pool)
    search._MAX_SIMULATED, search._FRONTIER_SIMULATED, search._MAX_ALTERNATIVE_ROUNDS = 4, 1, 1
    measure.PRECISIONS, measure._SHAPES = ("none",), measure._SHAPES[:1]
    measure._REQUESTS_ALONE, measure._USERS = 20, (2,)
    # How good a measurement of a second is says nothing about the command.
    measure.better_of_two = calibration.better_of_two = lambda once, _errors, report: once(report)
    quality.check_fits = lambda *_: None
    candidates._unmeasured = lambda *_: ""
    wait, measured = calibrate._calibrated, 1.0

    def calibrated(settings: Any, from_log: Any, _seconds: float, path: Any, *, force: bool) -> Any:
        return wait(settings, from_log, measured, path, force=force)

    calibrate._calibrated = calibrated
    evaluation.evaluate_model = _few_samples(evaluation.evaluate_model)
    pieces.PIECES = 2


def _verified_shortly(deploy_plan: Any) -> Any:
    """Three requests are enough."""

    def run(plan: Any, options: Any, progress: Any) -> Any:
        return deploy_plan(plan, replace(options, verify_seconds=max(5.0, 3.0 / plan.promise.rate)), progress)

    return run


async def _is_met(searcher: Any, rate: float) -> bool:
    """By one trial, whatever it is worth on a machine that others use."""
    trial = await searcher._trial(rate, searcher._seed, searcher._is_lost)
    return bool(trial.verdict == "met")


async def _bracket(searcher: Any, first: float) -> tuple[float, float]:
    await _is_met(searcher, first)
    return first, 2 * first


def _in_this_process(worker_pool: Any) -> Any:
    """So few simulations take less than starting other processes does."""

    def run(plan_request: Any, _workers: int | None) -> Any:
        return worker_pool(plan_request, 1)

    return run


def _at_least(function: Any, low: float) -> Any:
    """A load of three seconds needs some requests."""

    async def run(session: Any) -> float:
        return max(await function(session), low)

    return run


def _few_samples(function: Any) -> Any:
    def run(engine: Any, _samples: int, seed: int, report: Any) -> Any:
        return function(engine, 2, seed, report)

    return run


if __name__ == "__main__":
    shorten()
    from powerband.cli.main import main

    sys.exit(main())
