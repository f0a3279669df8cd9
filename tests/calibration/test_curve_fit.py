"""Fits of laws: planted coefficients come back, from few points, with noise and with outliers."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from random import Random

import pytest

from powerband.calibration.curve_fit import FitErrors, fit, spread
from powerband.cost import operator_models as laws
from powerband.cost.operator_models import DeviceSpeed
from powerband.spec.hardware.profile import Evidence, GemmModel, LinkModel

NONE = Evidence(source="", error=0.1)
SPEED = DeviceSpeed(989e12, 3.35e12, 132)
PLANTED = GemmModel(compute_share=0.81, memory_share=0.86, overhead_s=3.3e-6, sharpness=5.0, fill=0.25, evidence=NONE)
START = GemmModel(compute_share=0.5, memory_share=0.6, overhead_s=1e-5, sharpness=2.0, fill=0.1, evidence=NONE)
BOUNDS = {
    "compute_share": (0.05, 1.0),
    "memory_share": (0.2, 1.0),
    "overhead_s": (1e-7, 5e-5),
    "sharpness": (1.0, 20.0),
    "fill": (0.005, 3.0),
}
SHAPES = list(product((1, 64, 256, 1024, 4096), (1024, 6144, 28672), (1024, 4096, 14336)))


def gemm_s(law: GemmModel, shape: tuple[int, int, int]) -> float:
    return laws.gemm(law, SPEED, *shape, weight_bytes=2, input_bytes=2).total


def test_planted_coefficients_come_back() -> None:
    found = fit(START, BOUNDS, gemm_s, SHAPES, [gemm_s(PLANTED, shape) for shape in SHAPES])
    assert found.errors.mean < 1e-3
    for name in ("compute_share", "memory_share", "overhead_s", "fill"):
        assert getattr(found.model, name) == pytest.approx(getattr(PLANTED, name), rel=0.03)


def test_outliers_are_forgiven() -> None:
    noise = Random(3)
    seconds = [gemm_s(PLANTED, shape) * noise.lognormvariate(0, 0.05) for shape in SHAPES]
    for index in (3, 17, 30):
        seconds[index] *= 3
    found = fit(START, BOUNDS, gemm_s, SHAPES, seconds)
    assert found.model.compute_share == pytest.approx(PLANTED.compute_share, rel=0.05)
    assert found.model.memory_share == pytest.approx(PLANTED.memory_share, rel=0.05)
    assert found.errors.median < 0.06


def test_a_bound_holds() -> None:
    found = fit(START, {**BOUNDS, "compute_share": (0.05, 0.6)}, gemm_s, SHAPES, [gemm_s(PLANTED, s) for s in SHAPES])
    assert found.model.compute_share <= 0.6


def test_a_link_from_two_sizes() -> None:
    planted = LinkModel(latency_s=5e-6, bytes_per_s=2e11, evidence=NONE)
    sizes = [1e3, 1e9]
    start = replace(planted, latency_s=1e-5, bytes_per_s=1e10)
    bounds = {"latency_s": (1e-7, 1e-3), "bytes_per_s": (1e8, 1e12)}
    found = fit(start, bounds, laws.link, sizes, [laws.link(planted, size) for size in sizes])
    assert found.model.latency_s == pytest.approx(5e-6, rel=1e-3)
    assert found.model.bytes_per_s == pytest.approx(2e11, rel=1e-3)


def test_errors_by_hand() -> None:
    errors = FitErrors.from_values([1.1, 0.8, 1.0], [1.0, 1.0, 1.0])
    assert (errors.n, round(errors.median, 6), round(errors.mean, 6), round(errors.bias, 6)) == (3, 0.1, 0.1, -0.033333)


def test_calibration_points_lie_far_apart() -> None:
    chosen = spread([(float(x), float(y)) for x in range(11) for y in range(11)], 4)
    assert {(index // 11, index % 11) for index in chosen} == {(0, 0), (10, 10), (0, 10), (10, 0)}
