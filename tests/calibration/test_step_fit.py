"""Laws that are fitted to steps: what was planted is found again, and what was measured is predicted."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from powerband.calibration.curve_fit import FitErrors, non_negative
from powerband.calibration.engine_fit import (
    ClientPathTiming,
    busy_timings,
    fit_arrival_delay,
    fit_response_delay,
    fit_under_load,
    window_errors,
)
from powerband.calibration.step_fit import fit_steps, held_out_error
from powerband.cost.latency import LatencyModel
from powerband.cost.measured_steps import MeasuredStepTimes
from powerband.cost.step_log import StepSample
from powerband.errors import UsageError
from powerband.spec.deployment import Replica
from powerband.spec.hardware.profile import DeviceProfile, Evidence, Refinement, StepTimeModel
from powerband.spec.model.reader import read_model_spec

LAW = StepTimeModel(
    tokens=(1, 16, 64, 512, 2048),
    token_s=(0.010, 0.012, 0.030, 0.200, 0.800),
    rows=(1, 64),
    row_s=(0.001, 0.004),
    positions=(0, 100000),
    position_s=(3e-4, 0.10029999999999999),
    decode_s=2e-5,
    chunk_s=2e-4,
    pair_s=1e-8,
    read_s=4e-7,
)
Noise = Callable[[], float]


def grid(law: StepTimeModel, noise: Noise = lambda: 1.0) -> list[StepSample]:
    decodes = [(((1, context),) * rows, rows) for context in (16, 500, 1500) for rows in (1, 2, 4, 8, 16, 32, 48, 64)]
    chunks = [(((new, new + cached),), 1) for cached in (0, 900) for new in (8, 32, 64, 128, 256, 512, 1024, 2048)]
    mixed = [(((new, new), *((1, 700),) * rows), rows + 1) for new in (64, 300) for rows in (3, 20)]
    model = MeasuredStepTimes(law)
    return [StepSample(works, rows, model.step_s(works, rows) * noise()) for works, rows in [*decodes, *chunks, *mixed]]


def error_of(law: StepTimeModel, samples: Sequence[StepSample]) -> FitErrors:
    model = MeasuredStepTimes(law)
    return FitErrors.from_values([model.step_s(s.works, s.sampled) for s in samples], [s.seconds for s in samples])


def test_steps_without_noise_are_predicted_exactly() -> None:
    samples = grid(LAW)
    assert error_of(fit_steps(samples), samples).p90 < 0.002


def test_steps_that_were_not_fitted_are_predicted_within_their_noise() -> None:
    chance = random.Random(1)
    error = held_out_error(grid(LAW, lambda: chance.uniform(0.98, 1.02)))
    assert error.median < 0.02
    assert abs(error.bias) < 0.01


def test_a_step_that_something_else_held_up_changes_little() -> None:
    samples = grid(LAW)
    disturbed = [replace(s, seconds=s.seconds * (3 if i % 11 == 5 else 1)) for i, s in enumerate(samples)]
    assert error_of(fit_steps(disturbed), samples).median < 0.02


def test_more_work_never_takes_less_time() -> None:
    chance = random.Random(2)
    model = MeasuredStepTimes(fit_steps(grid(LAW, lambda: chance.uniform(0.7, 1.4))))
    for new in (2, 5, 63, 64, 65, 800, 2048, 5000):
        assert model.step_s([(new, 5000)], 1) <= model.step_s([(new + 1, 5000 + 1)], 1) + 1e-12
        assert model.step_s([(1, new)] * 3, 3) <= model.step_s([(1, new)] * 4, 4)


def test_few_steps_are_refused() -> None:
    with pytest.raises(UsageError, match="3 steps are too few"):
        fit_steps(grid(LAW)[:3])


def served(law: StepTimeModel, seed: int) -> list[StepSample]:
    """Steps under load: 4 % slower, with the host's work between them and a pause now and then."""
    model, now, chance, log = MeasuredStepTimes(law), 0.0, random.Random(seed), []
    for number in range(400):
        works = ((1, 300 + number + 9 * (number // 50)),) * chance.randint(1, 40) + (
            ((200, 200),) if number % 7 == 0 else ()
        )
        now += 0.0003 + 30e-6 * len(works) + 0.002 * (number % 7 == 0) + (0.0 if number % 50 else 0.5)
        seconds = 1.04 * model.step_s(works, len(works))
        log.append(StepSample(works, len(works), seconds, now, now + seconds))
        now += seconds
    return log


def test_what_a_load_adds_is_found_in_steps_without_a_pause() -> None:
    timings = busy_timings(served(LAW, 3))
    law, host = fit_under_load(grid(LAW), timings)
    assert max(window_errors(timings, law, host)) < 0.01
    assert max(window_errors(busy_timings(served(LAW, 4)), law, host)) < 0.01
    slow, alone = MeasuredStepTimes(law), MeasuredStepTimes(LAW)
    for works in ([(1, 1400)] * 60, [(1500, 1500)]):  # the load had neither
        assert slow.step_s(works, 1) == pytest.approx(1.04 * alone.step_s(works, 1), rel=0.03)


def test_the_way_to_the_engine_and_back() -> None:
    steps = [StepSample(((50 + n, 50 + n),), 1, 0.1, float(n), n + 0.1) for n in range(10)]
    path_timings = [ClientPathTiming(n - 0.01 - 1e-5 * (50 + n), (n + 0.102,), 50 + n) for n in range(1, 10)]
    arrival_s, token_s = fit_arrival_delay(path_timings, steps, step_s=0.002)
    assert arrival_s + 55 * token_s == pytest.approx(0.008 + 55e-5, rel=1e-3)
    assert sum(fit_response_delay(path_timings, steps)) == pytest.approx(0.002)


def test_coefficients_are_optimal_and_not_negative() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        matrix, wanted = rng.normal(size=(12, 5)), rng.normal(size=12)
        found = non_negative(matrix, wanted, scale=1e9)
        slope = matrix.T @ (matrix @ found - wanted)  # the Karush-Kuhn-Tucker conditions
        assert found.min() >= 0
        assert slope.min() > -1e-8
        assert abs(found @ slope) < 1e-8


def test_a_refined_model_takes_what_was_measured() -> None:
    spec = read_model_spec("src/powerband/demo")
    refinement = Refinement(
        model=spec.shape_digest, name="demo", steps=LAW, evidence=Evidence(source="test", error=0.07)
    )
    profile = DeviceProfile(
        name="local",
        kind="cpu",
        architecture="cpu",
        memory_bytes=2**34,
        bandwidth_bytes_per_s=40e9,
        peak_flops_per_s={"16bit": 1e12},
        multiprocessors=2,
        refinements=(refinement,),
    )
    model = LatencyModel(spec, profile, Replica(device="local", max_model_len=2048), "powerband")
    works = [(1, 100)] * 4 + [(50, 80)]
    seconds = MeasuredStepTimes(LAW).step_s(works, 5)
    assert model.step_s(works, 5) == seconds
    assert sum(model.parts(works, 5).values()) == pytest.approx(seconds)
    assert sum(model.bounds(works, 5).values()) == pytest.approx(seconds)
    assert model.band == 0.07
