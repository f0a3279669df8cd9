"""Coefficients of the laws from the tables: all points for the catalog, 25 of them to see what a calibration gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log
from typing import TypeVar

from benchmarks.accuracy import tables

from powerband.calibration.curve_fit import Bounds, FitResult, fit, spread
from powerband.cost import operator_models as laws
from powerband.spec.hardware.profile import (
    AttentionModel,
    DeviceProfile,
    ElementwiseModel,
    Evidence,
    GemmModel,
    LinkModel,
)

Model = TypeVar("Model")
Point = TypeVar("Point")

_ANY = Evidence(source="", error=0.0)
_QUANTIZE_S = 2e-6  # tables cannot tell it from the product's own overhead
GEMM_BOUNDS: Bounds = {
    "compute_share": (0.05, 1.0),
    "memory_share": (0.1, 1.0),
    "overhead_s": (1e-7, 5e-5),
    "sharpness": (1.0, 20.0),
    "fill": (0.005, 3.0),
}
_DECODE_BOUNDS: Bounds = {
    "memory_share": (0.1, 1.0),
    "decode_overhead_s": (1e-7, 5e-5),
    "extra_bytes": (1e3, 1e9),
}
_PREFILL_BOUNDS: Bounds = {
    "compute_share": (0.05, 1.0),
    "prefill_memory_share": (0.02, 1.0),
    "prefill_overhead_s": (1e-7, 5e-5),
    "fill": (0.01, 3.0),
}
_SUM_BOUNDS: Bounds = {
    "latency_s": (1e-6, 2e-4),
    "bytes_per_s": (1e8, 2e12),
    "direct_latency_s": (1e-6, 1e-4),
    "direct_bytes_per_s": (1e8, 4e12),
}


def gemm(profile: DeviceProfile, quantization: str, points: Sequence[tables.Gemm]) -> FitResult[GemmModel]:
    quantize_s = _QUANTIZE_S if quantization in ("fp8", "nvfp4", "w8a8") else 0.0
    start = GemmModel(
        compute_share=0.7,
        memory_share=0.8,
        overhead_s=3e-6,
        sharpness=3.0,
        fill=0.2,
        quantize_s=quantize_s,
        evidence=_ANY,
    )
    return _fit(start, GEMM_BOUNDS, tables.gemm_s(profile, quantization), points)


def experts(profile: DeviceProfile, quantization: str, points: Sequence[tables.Routed]) -> FitResult[GemmModel]:
    start = GemmModel(
        compute_share=0.4, memory_share=0.7, overhead_s=2e-5, sharpness=2.0, fill=0.2, extra_bytes=1e5, evidence=_ANY
    )
    return _fit(start, GEMM_BOUNDS, tables.experts_s(profile, quantization), points)


def decode(profile: DeviceProfile, precision: str, points: Sequence[tables.Attention]) -> FitResult[AttentionModel]:
    return _fit(_attention(), _DECODE_BOUNDS, tables.decode_s(profile, precision), points)


def prefill(
    profile: DeviceProfile, precision: str, points: Sequence[tables.Attention], known: AttentionModel
) -> FitResult[AttentionModel]:
    """known: has the coefficients of decodes, which stay."""
    start = replace(known, prefill_memory_share=0.5)
    return _fit(start, _PREFILL_BOUNDS, tables.prefill_s(profile, precision), points)


def mixed(profile: DeviceProfile, points: Sequence[tables.Mixed]) -> FitResult[AttentionModel]:
    bounds = {**_PREFILL_BOUNDS, **_DECODE_BOUNDS, "mixed_factor": (1.0, 4.0)}
    return _fit(replace(_attention(), mixed_factor=1.5), bounds, tables.mixed_s(profile), points)


def all_reduce(ranks: int, points: Sequence[tables.Sum]) -> FitResult[LinkModel]:
    """The better of two starts: where both ways meet is not smooth."""
    starts = [
        LinkModel(latency_s=latency, bytes_per_s=2e11, direct_latency_s=4e-6, direct_bytes_per_s=3e11, evidence=_ANY)
        for latency in (1e-5, 3e-5)
    ]
    found = [_fit(start, _SUM_BOUNDS, tables.all_reduce_s(ranks), points) for start in starts]
    return min(found, key=lambda fitted: fitted.errors.mean)


def transfer(points: Sequence[tables.Sum]) -> FitResult[LinkModel]:
    start = LinkModel(latency_s=1e-5, bytes_per_s=2e11, evidence=_ANY)
    bounds = {"latency_s": (1e-6, 2e-4), "bytes_per_s": (1e8, 2e12)}
    return _fit(start, bounds, lambda law, point: laws.link(law, point.moved_bytes), points)


def mixed_factor(
    profile: DeviceProfile, law: AttentionModel, points: Sequence[tables.Mixed]
) -> FitResult[AttentionModel]:
    """Of decodes in one call with a chunk, all else being known."""
    beside = [point for point in points if point.chunk and point.decodes]
    return _fit(replace(law, mixed_factor=1.5), {"mixed_factor": (1.0, 4.0)}, tables.mixed_s(profile), beside)


def elementwise(profile: DeviceProfile, points: Sequence[tables.Kernel]) -> FitResult[ElementwiseModel]:
    start = ElementwiseModel(kernel_s=2e-6, memory_share=0.7, evidence=_ANY)
    bounds = {"kernel_s": (1e-7, 2e-5), "memory_share": (0.2, 2.0)}
    return _fit(start, bounds, tables.elementwise_s(profile), points)


def _attention() -> AttentionModel:
    return AttentionModel(
        compute_share=0.5,
        memory_share=0.8,
        prefill_overhead_s=9e-6,
        decode_overhead_s=9e-6,
        fill=0.3,
        extra_bytes=1e6,
        prefill_memory_share=0.5,
        prefill_evidence=_ANY,
        decode_evidence=_ANY,
    )


def _fit(
    start: Model, bounds: Bounds, predict: Callable[[Model, Point], float], points: Sequence[Point]
) -> FitResult[Model]:
    return fit(start, bounds, predict, points, [point.seconds for point in points])  # type: ignore[attr-defined]


def few_gemms(points: Sequence[tables.Gemm]) -> list[tables.Gemm]:
    """25: five matrices that differ most, each with 1, 64, 256, 1024 and 4096 tokens."""
    matrices = sorted({(point.n, point.k) for point in points})
    chosen = {matrices[index] for index in spread([(log(n), log(k)) for n, k in matrices], 5)}
    return [point for point in points if (point.n, point.k) in chosen and point.m in (1, 64, 256, 1024, 4096)]


def few_attentions(points: Sequence[tables.Attention]) -> list[tables.Attention]:
    """25 that differ most in heads, batch and length."""
    features = [[log(size) for size in (p.heads, p.kv_heads, p.batch, p.length)] for p in points]
    return [points[index] for index in spread(features, 25)]
