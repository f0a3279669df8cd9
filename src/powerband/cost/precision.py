"""Which precision `--dtype auto` means on a device."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from powerband.spec.model import ModelSpec

# CPU features with which products of bfloat16 are faster than products of float32.
FAST_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")


def auto_dtype(spec: ModelSpec, kind: Literal["cpu", "cuda"], features: Collection[str] = ()) -> str:
    """As stored, where the device is fast at it; else float32. features: of the CPU (spec.device.Device.features)."""
    if kind == "cuda":
        return spec.dtype
    fast = any(feature in features for feature in FAST_BFLOAT16)
    return "bfloat16" if spec.dtype != "float32" and fast else "float32"
