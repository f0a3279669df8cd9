"""Performance models of devices without measurements: what software reaches on chips of the same architecture.

Shares of peak and bandwidth, seconds of overhead: medians of what was fitted on measured devices of that architecture
(the catalog, spec/hardware/devices/), with the width that datasheets alone leave.
"""

from __future__ import annotations

from collections.abc import Mapping

from powerband.spec.hardware.profile import (
    AttentionModel,
    DeviceProfile,
    ElementwiseModel,
    Evidence,
    GemmModel,
    LinkModel,
)

# Products: share of the 16-bit peak, share of the bandwidth. Prefill attention: share of the 16-bit peak.
_PRODUCTS: Mapping[str, tuple[float, float]] = {
    "turing": (0.45, 0.80),
    "ampere": (0.80, 0.76),
    "ada": (0.58, 0.77),
    "hopper": (0.81, 0.85),
    "blackwell": (0.77, 0.82),
    "cdna3": (0.55, 0.75),
    "cpu": (0.60, 0.75),
}
_PREFILL = {"turing": 0.30, "ampere": 0.51, "ada": 0.46, "hopper": 0.56, "blackwell": 0.50, "cdna3": 0.40, "cpu": 0.35}
_LOW_POWER_WATTS = 80.0  # below, sustained tensor work throttles
_LOW_POWER_RATIO = 0.8
# Beside how 16-bit products do: share of the own peak that 8- and 4-bit products reach
_NARROW = {"none": 1.0, "int8": 0.95, "int4": 0.95, "mxfp4": 0.9, "fp8": 0.8, "fp8_static": 0.8, "w8a8": 0.9}
_QUANTIZE_S = {"fp8": 3.0e-6, "nvfp4": 2.0e-6}

# Measured: AIConfigurator's vLLM_custom_graph tables (notes in the catalog): latency, share of the link by ranks
_NVLINK = {2: (4.5e-6, 0.55), 4: (5.2e-6, 0.60), 8: (6.2e-6, 0.73)}
_PCIE = {2: (6.0e-6, 0.55), 4: (13e-6, 0.25), 8: (24e-6, 0.15)}


def gemm_model(profile: DeviceProfile, quantization: str) -> GemmModel:
    compute, memory = _PRODUCTS.get(profile.architecture, (0.5, 0.7))
    compute *= _NARROW.get(quantization, 0.7) * _throttled(profile)
    on_cpu = profile.kind == "cpu"
    return GemmModel(
        compute_share=compute,
        memory_share=memory,
        overhead_s=5e-6 if on_cpu else 3e-6,
        sharpness=3.0,
        fill=0.0 if on_cpu else 0.2,
        quantize_s=_QUANTIZE_S.get(quantization, 0.0),
        evidence=_evidence(profile),
    )


def experts_model(profile: DeviceProfile, quantization: str) -> GemmModel:
    compute, memory = _PRODUCTS.get(profile.architecture, (0.5, 0.7))
    compute *= _NARROW.get(quantization, 0.7) * _throttled(profile) * 0.6
    return GemmModel(
        compute_share=compute,
        memory_share=memory * 0.85,
        overhead_s=20e-6,
        sharpness=2.0,
        fill=0.0 if profile.kind == "cpu" else 0.2,
        evidence=_evidence(profile),
    )


def attention_model(profile: DeviceProfile, kv_precision: str) -> AttentionModel:
    evidence = _evidence(profile)
    memory = _PRODUCTS.get(profile.architecture, (0.5, 0.7))[1]
    on_cpu = profile.kind == "cpu"
    return AttentionModel(
        compute_share=_PREFILL.get(profile.architecture, 0.35) * _throttled(profile),
        memory_share=memory * (0.9 if kv_precision in ("fp8", "int8") else 1.0),
        prefill_overhead_s=8e-6,
        decode_overhead_s=5e-6,
        fill=0.0 if on_cpu else 0.3,
        prefill_evidence=evidence,
        decode_evidence=evidence,
    )


def elementwise_model(profile: DeviceProfile) -> ElementwiseModel:
    return ElementwiseModel(kernel_s=1.8e-6, memory_share=0.7, evidence=_evidence(profile))


def all_reduce_model(profile: DeviceProfile, ranks: int) -> LinkModel:
    """By the nearest number of ranks that was measured: over the link between devices, else through the host."""
    table = _NVLINK if profile.link is not None else _PCIE
    link = profile.link or profile.host_link
    latency, share = table[min(table, key=lambda known: abs(known - ranks))]
    rate = link.bytes_per_s if link is not None else profile.bandwidth_bytes_per_s / 4
    error = 0.3 if profile.link is not None else 0.5
    return LinkModel(latency_s=latency, bytes_per_s=rate * share, evidence=Evidence(source=_SOURCE, error=error))


def transfer_model(profile: DeviceProfile) -> LinkModel:
    link = profile.link or profile.host_link
    rate = link.bytes_per_s if link is not None else profile.bandwidth_bytes_per_s / 4
    return LinkModel(latency_s=15e-6, bytes_per_s=rate * 0.7, evidence=Evidence(source=_SOURCE, error=0.4))


def host_transfer_model(profile: DeviceProfile) -> LinkModel | None:
    """From pinned host memory. None: the device is the host."""
    if profile.host_link is None:
        return None
    rate = profile.host_link.bytes_per_s * (0.71 if profile.host_link.bytes_per_s < 4e10 else 0.83)
    return LinkModel(latency_s=15e-6, bytes_per_s=rate, evidence=Evidence(source=_SOURCE, error=0.25))


_SOURCE = "prior: no measurement of this device"


def _throttled(profile: DeviceProfile) -> float:
    """Small cards cannot hold their clocks under tensor work; Turing's prior has it in it."""
    low = profile.watts is not None and profile.watts < _LOW_POWER_WATTS and profile.architecture != "turing"
    return _LOW_POWER_RATIO if low else 1.0


def _evidence(profile: DeviceProfile) -> Evidence:
    low = profile.watts is not None and profile.watts < _LOW_POWER_WATTS
    known = profile.architecture in _PRODUCTS
    return Evidence(source=_SOURCE, error=0.35 if low or not known else 0.25)
