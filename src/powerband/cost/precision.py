"""Which precision the settings mean for a model on a device: of activations, of weights and of the KV cache."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from powerband.errors import UsageError
from powerband.spec.checkpoint.quantization import DEFAULT_GROUP, PLAIN, WeightPrecisions
from powerband.spec.model.model_spec import ModelSpec
from powerband.spec.settings import EngineSettings

# CPU features with which products of bfloat16 are faster than products of float32.
FAST_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")


def auto_dtype(
    spec: ModelSpec,
    kind: Literal["cpu", "cuda"],
    features: Collection[str] = (),
    *,
    kernels: bool = False,
    quantization: str = "none",
) -> str:
    """As stored, where the device is fast at it; else float32.

    features: of the CPU (spec.device.Device.features). kernels: whether it has kernels of our own, which are fast at
    bfloat16 on any CPU. Activations beside quantized weights are bfloat16 always.
    """
    if kind == "cuda":
        return spec.dtype
    if quantization != "none" or spec.weight_format is not None:
        return "bfloat16"
    fast = kernels or any(feature in features for feature in FAST_BFLOAT16)
    return "bfloat16" if spec.dtype != "float32" and fast else "float32"


def weight_precisions(
    spec: ModelSpec, settings: EngineSettings, kind: Literal["cpu", "cuda"], dtype: str
) -> WeightPrecisions:
    """What the weights are held in. Raises UsageError for settings that contradict the model, the device or each other.

    dtype: of the activations, "auto" resolved.
    """
    stored, asked = spec.weight_format, settings.quantization
    if stored is not None and asked != "none":
        raise UsageError(
            f"quantization is '{asked}', but the checkpoint is quantized already: {stored.method}, {stored.bits} bits.",
            hint="Leave it out, or use the model's version in 16 bits.",
            param="quantization",
        )
    if stored is None and asked == "none":
        if not settings.quantize_head:
            raise UsageError(
                "quantize_head is off, but nothing is quantized.",
                hint="Leave it out, or add --quantization int8 or int4.",
                param="quantize_head",
            )
        return PLAIN
    what = f"quantization '{asked}'" if stored is None else f"A checkpoint quantized with {stored.method}"
    if kind != "cpu":
        raise UsageError(f"{what} runs on the CPU only so far.", hint="Use --device cpu.", param="quantization")
    if dtype != "bfloat16":
        raise UsageError(
            f"{what} computes with activations in bfloat16; dtype is '{dtype}'.",
            hint="Leave --dtype out.",
            param="dtype",
        )
    head: Literal["none", "int8"] = "int8" if settings.quantize_head and spec.generates else "none"
    if stored is None:
        return WeightPrecisions("int4" if asked == "int4" else "int8", head)
    layers: Literal["int8", "int4"] = "int8" if stored.bits == 8 else "int4"
    return WeightPrecisions(layers, head, min(stored.group_size or DEFAULT_GROUP, DEFAULT_GROUP), not stored.symmetric)


def kv_dtype(settings: EngineSettings, dtype: str, held: WeightPrecisions, *, can_be_int8: bool) -> str:
    """What the KV cache is held in, beside weights in `held`.

    can_be_int8: whether attention can read such a cache. Raises UsageError for one in bfloat16 beside activations that
    are not.
    """
    asked = settings.kv_cache_dtype
    if asked == "auto":
        return "int8" if held.layers != "none" and can_be_int8 else dtype
    if asked == "bfloat16" and dtype != "bfloat16":
        raise UsageError(
            f"kv_cache_dtype is 'bfloat16', but dtype is '{dtype}'.",
            hint="Leave one of them out.",
            param="kv_cache_dtype",
        )
    return asked
