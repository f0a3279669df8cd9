"""Fits to recorded steps give what version 0.1.0 gave, which had least squares of its own (recorded/fits.json)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from powerband.calibration.curve_fit import FitErrors, fit, scipy_optimize
from powerband.calibration.engine_fit import busy_timings, fit_under_load
from powerband.calibration.measure import small_llama
from powerband.calibration.operator_fit import ModelSteps, fit_precision
from powerband.calibration.step_fit import fit_steps
from powerband.cost.latency import LatencyModel
from powerband.cost.measured_steps import MeasuredStepTimes
from powerband.cost.step_log import StepSample, read_step_log
from powerband.errors import EnvironmentFault
from powerband.spec.hardware.profile import DeviceProfile
from powerband.spec.model.reader import read_model_spec

RECORDED = Path(__file__).parent / "recorded"
EXPECTED = json.loads((RECORDED / "fits.json").read_text())
DECODES = [((1, 200),) * count for count in (1, 2, 4, 8)]
WORKS: list[tuple[tuple[int, int], ...]] = [*DECODES, ((64, 64),), ((200, 200), (1, 100), (1, 300))]


@pytest.fixture(scope="module")
def steps() -> tuple[StepSample, ...]:
    [run] = read_step_log(RECORDED / "steps.jsonl")
    return run.samples


def test_step_times_of_a_model(steps: tuple[StepSample, ...]) -> None:
    model = MeasuredStepTimes(fit_steps(steps))
    assert [model.step_s(works, len(works)) for works in WORKS] == pytest.approx(EXPECTED["steps_s"], rel=1e-3)


def test_step_times_under_load_with_the_hosts_part(steps: tuple[StepSample, ...]) -> None:
    fitted, host = fit_under_load(steps, busy_timings(steps))
    model = MeasuredStepTimes(fitted)
    seconds = [model.mean_s(works, len(works)) + host.step_s + host.per_request_s * len(works) for works in WORKS]
    assert seconds == pytest.approx(EXPECTED["under_load_s"], rel=1e-3)


def test_operator_models_of_a_device() -> None:
    device = DeviceProfile(
        name="local",
        kind="cpu",
        architecture="cpu",
        memory_bytes=2**34,
        bandwidth_bytes_per_s=1e10,
        peak_flops_per_s={"16bit": 2.4e11, "float32": 1.2e11},
        multiprocessors=2,
    )
    measured = [recorded_model(**one) for one in json.loads((RECORDED / "operator_steps.json").read_text())]
    fitted, _ = fit_precision(device, measured)
    expected = EXPECTED["operators"]
    for steps, seconds in zip(measured, expected["steps_s"], strict=True):
        model = LatencyModel(steps.spec, fitted, steps.replica, "powerband")
        assert [model.step_s(s.works, s.sampled) for s in steps.samples[::4]] == pytest.approx(seconds, rel=0.05)
    errors = errors_of(fitted, measured)
    assert errors.mean <= 1.02 * expected["mean_error"]
    assert errors.median <= 1.05 * expected["median_error"]


def recorded_model(shape: list[int], samples: list[Any]) -> ModelSteps:
    steps = [StepSample(tuple((new, context) for new, context in works), rows, s) for works, rows, s in samples]
    return ModelSteps(read_model_spec(small_llama(*shape)), "none", "16bit", tuple(steps))


def errors_of(profile: DeviceProfile, measured: list[ModelSteps]) -> FitErrors:
    predicted, seconds = [], []
    for steps in measured:
        model = LatencyModel(steps.spec, profile, steps.replica, "powerband")
        predicted += [model.step_s(sample.works, sample.sampled) for sample in steps.samples]
        seconds += [sample.seconds for sample in steps.samples]
    return FitErrors.from_values(predicted, seconds)


def test_without_scipy_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(EnvironmentFault, match="scipy") as failure:
        scipy_optimize()
    assert "powerband[serve]" in (failure.value.hint or "")
    with pytest.raises(EnvironmentFault, match="scipy"):
        fit(StepSample((), 0, 1.0), {"seconds": (0.1, 2.0)}, lambda sample, _: sample.seconds, [None], [1.0])
