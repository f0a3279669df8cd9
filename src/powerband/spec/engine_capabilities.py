"""What each engine can do, as far as planning needs it: on which devices, in which precisions, over how many of them.

From the documentation of vLLM 0.15 to 0.24 (hardware of quantization kernels, parallelism), SGLang 0.5 and
TensorRT-LLM 1.x (support matrix). Ours: what this version runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from powerband.spec.deployment import EngineName, KVPrecision, Quantization
from powerband.spec.hardware.profile import DeviceKind, DeviceProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCapabilities:
    """What an engine can do."""

    kinds: tuple[DeviceKind, ...]
    divides: bool = True  # a model over several devices
    offloads: bool = False  # weights to the host's memory
    speculates: bool = True
    # Precisions that it quantizes to while loading; others need a quantized checkpoint.
    loads: tuple[Quantization, ...] = ("none",)


CAPABILITIES: Mapping[EngineName, EngineCapabilities] = {
    "powerband": EngineCapabilities(
        kinds=("cpu", "cuda"), divides=False, speculates=False, loads=("none", "int8", "int4")
    ),
    "vllm": EngineCapabilities(kinds=("cuda", "rocm"), offloads=True, loads=("none", "fp8")),
    "sglang": EngineCapabilities(kinds=("cuda", "rocm"), offloads=True, loads=("none", "fp8")),
    "trtllm": EngineCapabilities(kinds=("cuda",)),
}
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


def unsupported_reason(engine: EngineName, profile: DeviceProfile, quantization: Quantization) -> str:
    """Why an engine cannot run on a device in a precision; '' when it can."""
    abilities = CAPABILITIES[engine]
    if profile.kind not in abilities.kinds:
        return f"{engine} on a device of kind {profile.kind} is not modelled"
    if engine == "powerband":
        if profile.kind == "cuda" and quantization != "none":
            return "powerband computes in 16 bits on GPUs so far"
        if profile.kind == "cpu" and quantization not in abilities.loads:
            return f"powerband on a CPU knows {', '.join(abilities.loads)}"
        return ""
    if profile.architecture not in _KERNELS[quantization]:
        known = [name for name, architectures in _KERNELS.items() if profile.architecture in architectures]
        has = f"; there are {', '.join(known)}" if known else ""
        return f"no kernels for {quantization} on {profile.architecture}{has}"
    return ""


def kv_precisions(
    engine: EngineName, profile: DeviceProfile, quantization: Quantization, stored: KVPrecision | None = None
) -> tuple[KVPrecision, ...]:
    """What the KV cache may be held in. stored: what the checkpoint has scales for."""
    if engine == "powerband":
        return ("int8",) if quantization in ("int8", "int4") else ("16bit",)
    if stored is not None:
        return (stored,)
    has_fp8 = profile.architecture in _KERNELS["fp8"]
    return ("16bit", "fp8") if has_fp8 and quantization in ("fp8", "fp8_static", "nvfp4") else ("16bit",)
