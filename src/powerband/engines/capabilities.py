"""What an engine supports, as far as planning needs it: devices, precisions, and parallelism.

From the documentation of vLLM 0.15 to 0.24 (hardware support of quantization kernels, parallelism), SGLang 0.5 and
TensorRT-LLM 1.x (support matrix). For Powerband's own engine: what this version runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from powerband.spec.deployment import KVPrecision, Quantization

if TYPE_CHECKING:
    from powerband.spec.hardware.profile import DeviceKind, DeviceProfile

# GPU architectures whose tensor cores or kernels support a precision; for all engines but Powerband's own.
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
# Precisions that the planner tries by default: for most purposes as good as 16 bits. Four bits cost quality, which the
# planner cannot assess.
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
    """Precisions of the KV cache. stored: the precision that the checkpoint has scales for."""
    if stored is not None:
        return (stored,)
    has_fp8 = profile.architecture in _KERNELS["fp8"]
    return ("16bit", "fp8") if has_fp8 and quantization in ("fp8", "fp8_static", "nvfp4") else ("16bit",)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCapabilities:
    """What an engine supports."""

    kinds: tuple[DeviceKind, ...] = ()
    supports_multi_device: bool = True  # splits a model over several devices
    supports_cpu_offload: bool = False  # offloads weights to host memory
    supports_speculation: bool = True
    # Precisions that it quantizes to while loading; others need a quantized checkpoint.
    online_quantizations: tuple[Quantization, ...] = ("none",)
    missing_kernels: Callable[[DeviceProfile, Quantization], str] = missing_kernels
    kv_precisions: Callable[[DeviceProfile, Quantization, KVPrecision | None], tuple[KVPrecision, ...]] = kv_precisions
