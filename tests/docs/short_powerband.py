"""`powerband` for the tests of the documentation: the same program, whose measurements take seconds instead of minutes.

Commands are typed as the pages say; only lengths that a user leaves to the program are shorter.
"""

from __future__ import annotations

import sys
from typing import Any


def shorten() -> None:
    from powerband import evaluation as pieces
    from powerband.bench import search as rate_search
    from powerband.bench import session
    from powerband.calibration import client_capacity, measure
    from powerband.cli.model import eval as evaluation
    from powerband.cli.plan import calibrate
    from powerband.cli.service import deploy
    from powerband.planner import estimates, search
    from powerband.spec.workload import options

    options.DEFAULT_DURATION_S = 3.0
    deploy.VerifyFlags.__init__.__kwdefaults__["verify_seconds"] = 16.0
    session.SWEEP = (0.25, 1.0)
    session._FULL_LOAD = 8
    rate_search.MIN_REQUESTS, rate_search.RESOLUTION, rate_search._CONFIRMATIONS = 2, 1.9, 1
    session.BenchSession._single_user_rate = _at_least(session.BenchSession._single_user_rate, 2.0)
    client_capacity.RateRamp.__init__.__kwdefaults__ |= {"levels": 2, "level_s": 1.0}
    search._SECONDS, search._MIN_REQUESTS, search._SAMPLED_REQUESTS = 15.0, 40, 300
    search.LIMITS = estimates.LIMITS = estimates.LIMITS[:1]
    search._MAX_SIMULATED, search._FRONTIER_SIMULATED, search._MAX_ALTERNATIVE_ROUNDS = 8, 2, 2
    measure.PRECISIONS, measure._SHAPES = ("none",), measure._SHAPES[:1]
    measure._REQUESTS_ALONE, measure._USERS = 20, (2,)
    wait, measured = calibrate._calibrated, 1.0

    def calibrated(settings: Any, from_log: Any, _seconds: float, path: Any) -> Any:
        return wait(settings, from_log, measured, path)

    calibrate._calibrated = calibrated
    evaluation.evaluate_model = _few_samples(evaluation.evaluate_model)
    pieces.PIECES = 2


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
