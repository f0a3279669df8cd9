"""From timed steps of a few small models to the laws of a device, which hold for any model.

Whole steps are what an engine takes, so whole steps are fitted: the coefficients of products, attention and the small
kernels of a layer at once, for one precision after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from powerband.calibration.curve_fit import Bounds, FitErrors, fit
from powerband.cost.latency import LatencyModel
from powerband.cost.step_log import StepSample
from powerband.spec.checkpoint.quantization import WeightPrecisions
from powerband.spec.deployment import KVPrecision, Quantization, Replica
from powerband.spec.hardware.profile import AttentionModel, DeviceProfile, ElementwiseModel, Evidence, GemmModel
from powerband.spec.model.counts import parameter_bytes, step_flops
from powerband.spec.model.model_spec import ModelSpec

_BOUNDS: Bounds = {
    "compute_share": (0.05, 6.0),  # 8-bit products may go beyond the 16-bit peak
    "memory_share": (0.05, 6.0),
    "overhead_s": (1e-7, 1e-3),
    "sharpness": (1.0, 8.0),
    "prefill_share": (0.02, 6.0),
    "decode_share": (0.02, 6.0),
    "prefill_overhead_s": (1e-7, 1e-3),
    "decode_overhead_s": (1e-7, 1e-3),
    "kernel_s": (1e-7, 1e-3),
    "elementwise_share": (0.02, 6.0),
}
_SMALL_KERNELS = ("kernel_s", "elementwise_share")


@dataclass(frozen=True, slots=True)
class ModelSteps:
    """Steps of one model in one precision."""

    spec: ModelSpec
    quantization: Quantization
    kv_precision: KVPrecision
    samples: tuple[StepSample, ...]

    @property
    def replica(self) -> Replica:
        return Replica(
            device="local",
            quantization=self.quantization,
            kv_precision=self.kv_precision,
            max_model_len=self.spec.max_position,
        )


@dataclass(frozen=True, slots=True)
class PrecisionFit:
    """The fit of one precision."""

    quantization: Quantization
    steps: int
    bytes_per_s: float  # the most that a step reached
    flops_per_s: float  # the most that a step reached
    held_out: FitErrors  # on steps that the fit had not seen


@dataclass(frozen=True, slots=True)
class _Coefficients:
    compute_share: float = 0.7
    memory_share: float = 0.7
    overhead_s: float = 1e-5
    sharpness: float = 2.0
    prefill_share: float = 0.3
    decode_share: float = 0.5
    prefill_overhead_s: float = 1e-5
    decode_overhead_s: float = 1e-5
    kernel_s: float = 5e-6
    elementwise_share: float = 0.5


def peak_rates(measured: Sequence[ModelSteps]) -> tuple[float, float]:
    """(bytes/s of weights, FLOP/s) of the steps that came furthest."""
    rates, flops = [0.0], [0.0]
    for steps in measured:
        quantized = steps.quantization != "none"
        held = WeightPrecisions(steps.quantization, "int8") if quantized else WeightPrecisions()  # type: ignore[arg-type]  # of the engine's
        weights = parameter_bytes(steps.spec, "bfloat16", held)
        for sample in steps.samples:
            flops.append(step_flops(steps.spec, sample.works, sample.sampled).total / sample.seconds)
            if sample.sampled:
                rates.append(weights / sample.seconds)
    return max(rates), max(flops)


def fit_precision(profile: DeviceProfile, measured: Sequence[ModelSteps]) -> tuple[DeviceProfile, PrecisionFit]:
    """`profile` with the laws of one precision: of products, attention, and, of 'none', the small kernels."""
    first = measured[0]
    points = [(steps, sample) for steps in measured for sample in steps.samples]
    train, test = points[::2], points[1::2]
    seen = [sample.seconds for _, sample in test]
    half = _fitted(profile, train)
    models = _models(half, measured)
    held_out = FitErrors.from_values([models[id(steps)].step_s(s.works, s.sampled) for steps, s in test], seen)
    whole = _fitted(profile, points, error=held_out.p90)
    rates, flops = peak_rates(measured)
    return whole, PrecisionFit(first.quantization, len(points), rates, flops, held_out)


def _fitted(
    profile: DeviceProfile, points: Sequence[tuple[ModelSteps, StepSample]], error: float = 0.0
) -> DeviceProfile:
    first = points[0][0]
    bounds = {
        name: edges for name, edges in _BOUNDS.items() if first.quantization == "none" or name not in _SMALL_KERNELS
    }
    groups = {id(steps): steps for steps, _ in points}
    known: dict[_Coefficients, dict[int, LatencyModel]] = {}

    def predict(coefficients: _Coefficients, point: tuple[ModelSteps, StepSample]) -> float:
        models = known.get(coefficients)
        if models is None:
            known.clear()
            made = _with(profile, first, coefficients, error)
            models = known[coefficients] = _models(made, list(groups.values()))
        return models[id(point[0])].step_s(point[1].works, point[1].sampled)

    found = fit(_Coefficients(), bounds, predict, points, [sample.seconds for _, sample in points])
    return _with(profile, first, found.model, error)


def _models(profile: DeviceProfile, measured: Sequence[ModelSteps]) -> dict[int, LatencyModel]:
    return {id(steps): LatencyModel(steps.spec, profile, steps.replica, "powerband") for steps in measured}


def _with(profile: DeviceProfile, of: ModelSteps, found: _Coefficients, error: float) -> DeviceProfile:
    evidence = Evidence(source="steps timed on this machine", error=error)
    gemm = GemmModel(
        compute_share=found.compute_share,
        memory_share=found.memory_share,
        overhead_s=found.overhead_s,
        sharpness=found.sharpness,
        evidence=evidence,
    )
    attention = AttentionModel(
        compute_share=found.prefill_share,
        memory_share=found.decode_share,
        prefill_overhead_s=found.prefill_overhead_s,
        decode_overhead_s=found.decode_overhead_s,
        prefill_evidence=evidence,
        decode_evidence=evidence,
    )
    own = "powerband"
    changed = replace(
        profile,
        gemm={**profile.gemm, own: {**profile.gemm.get(own, {}), of.quantization: gemm}},
        attention={**profile.attention, own: {**profile.attention.get(own, {}), of.kv_precision: attention}},
    )
    if of.quantization != "none":
        return changed
    small = ElementwiseModel(kernel_s=found.kernel_s, memory_share=found.elementwise_share, evidence=evidence)
    return replace(changed, elementwise={**profile.elementwise, own: small})
