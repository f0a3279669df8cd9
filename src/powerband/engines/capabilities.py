"""What an engine can do, as far as planning needs it: on which devices, in which precisions, over how many of them.

From the documentation of vLLM 0.15 to 0.24 (hardware of quantization kernels, parallelism), SGLang 0.5 and
TensorRT-LLM 1.x (support matrix). Ours: what this version runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from powerband.spec.deployment import KVPrecision, Quantization

if TYPE_CHECKING:
    from powerband.spec.hardware.profile import DeviceKind, DeviceProfile

# Architectures whose tensor cores, or kernels, take a precision; for all engines but ours.
_KERNELS: Mapping[Quantization, tuple[str, ...]] = {
    "none": ("turing", "ampere", "ada", "hopper", "blackwell", "cdna3"),
    "fp8": ("ada", "hopper", "blackwell", "cdna3"),
    "fp8_static": ("ada", "hopper", "blackwell", "cdna3"),
    "int8": ("ampere", "ada", "hopper", "blackwell"),
    "w8a8": ("turing", "ampere", "ada", "hopper"),
    "int4": ("turing", "ampere", "ada", "hopper", "blackwell"),
    "nvfp4": ("blackwell",),
    "mxfp4": ("ampere", "ada", "hopper", "blackwell", "cdna3"),
}
# What is tried without being asked for: as precise as 16 bits, for most purposes. Four bits cost quality that a planner
# does not know.
DEFAULT_QUANTIZATIONS: tuple[Quantization, ...] = ("none", "fp8", "int8", "w8a8")


def missing_kernels(profile: DeviceProfile, quantization: Quantization) -> str:
    """Why a device cannot compute in a precision; '' when it can."""
    if profile.architecture in _KERNELS[quantization]:
        return ""
    known = [name for name, architectures in _KERNELS.items() if profile.architecture in architectures]
    has = f"; there are {', '.join(known)}" if known else ""
    return f"no kernels for {quantization} on {profile.architecture}{has}"


def kv_precisions(
    profile: DeviceProfile, quantization: Quantization, stored: KVPrecision | None
) -> tuple[KVPrecision, ...]:
    """What the KV cache may be held in. stored: what the checkpoint has scales for."""
    if stored is not None:
        return (stored,)
    has_fp8 = profile.architecture in _KERNELS["fp8"]
    return ("16bit", "fp8") if has_fp8 and quantization in ("fp8", "fp8_static", "nvfp4") else ("16bit",)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCapabilities:
    """What an engine can do."""

    kinds: tuple[DeviceKind, ...] = ()
    divides: bool = True  # a model over several devices
    offloads: bool = False  # weights to the host's memory
    speculates: bool = True
    # Precisions that it quantizes to while loading; others need a quantized checkpoint.
    loads: tuple[Quantization, ...] = ("none",)
    missing_kernels: Callable[[DeviceProfile, Quantization], str] = missing_kernels
    kv_precisions: Callable[[DeviceProfile, Quantization, KVPrecision | None], tuple[KVPrecision, ...]] = kv_precisions
