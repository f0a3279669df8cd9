"""In which precision a checkpoint is stored, as its configuration says: what planning needs of any engine's formats.

The engine's own reader (spec.checkpoint.quantization) can load some of them; here all are distinguished by their cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from powerband.errors import UsageError
from powerband.spec.checkpoint.quantization import QUANTIZATION_KEYS
from powerband.spec.checkpoint.quantized_modules import read_quantized_modules
from powerband.spec.config_reader import shown
from powerband.spec.deployment import KVPrecision, Quantization
from powerband.spec.model.model_spec import ModelSpec
from powerband.spec.model.pooling import MODULES
from powerband.spec.model.reader import read_model_config, read_model_spec, with_stored_head


@dataclass(frozen=True, slots=True)
class CheckpointPrecision:
    """The precision of a checkpoint."""

    quantization: Quantization = "none"  # 'none': 16 bits
    kv_precision: KVPrecision | None = None  # that it has scales of keys and values for; None: it has none


def read_for_planning(path: Path) -> tuple[ModelSpec, CheckpointPrecision]:
    """The model of a config.json, as if it were stored in 16 bits, and what it is stored in.

    Raises EnvironmentFault when the file is not there, UsageError when what it says cannot be planned.
    """
    config = read_model_config(path)
    plain = {name: value for name, value in config.items() if name not in QUANTIZATION_KEYS}
    spec = with_stored_head(read_model_spec(plain), path)
    if not spec.generates or path.with_name(MODULES).is_file():
        raise UsageError(
            f"{path}: the model gives embeddings or scores, and plans are made for models that generate.",
            hint="Serve it with 'powerband serve'; 'powerband memory' says what it needs.",
            code="unsupported_model",
            param="model",
        )
    found = _quantization(config)
    modules = read_quantized_modules(found, _method(found)) if found is not None else None
    return replace(spec, quantized_modules=modules), stored_precision(config)


def stored_precision(config: Mapping[str, Any]) -> CheckpointPrecision:
    """From what `read_model_config` returns. Raises UsageError for what is none of the known formats."""
    found = _quantization(config)
    if found is None:
        return CheckpointPrecision()
    method = _method(found)
    if method in ("gptq", "awq", "gptq_marlin", "awq_marlin"):
        return CheckpointPrecision("int8" if found.get("bits", found.get("w_bit")) == 8 else "int4")
    if method == "mxfp4":
        return CheckpointPrecision("mxfp4")
    if method in ("fp8", "fbgemm_fp8"):
        return CheckpointPrecision("fp8_static" if found.get("activation_scheme") == "static" else "fp8", _kv(found))
    if method == "compressed-tensors":
        return _compressed_tensors(found)
    if method == "modelopt":
        return _modelopt(found)
    raise _unknown(f"quant_method {shown(method)}")


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((config[key] for key in QUANTIZATION_KEYS if isinstance(config.get(key), Mapping)), None)


def _method(found: Mapping[str, Any]) -> str:
    return str(found.get("quant_method", "compressed-tensors" if "config_groups" in found else "unknown")).lower()


def _compressed_tensors(found: Mapping[str, Any]) -> CheckpointPrecision:
    groups = found.get("config_groups")
    group = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(group, Mapping) or not isinstance(weights, Mapping):
        raise _unknown("compressed-tensors without groups")
    inputs = group.get("input_activations")
    kind, bits = weights.get("type", "int"), weights.get("num_bits")
    kv = _kv(found)
    if kind == "float" and bits == 4:
        return CheckpointPrecision("nvfp4" if inputs else "mxfp4", kv)
    if kind == "float" and bits == 8:
        is_static = isinstance(inputs, Mapping) and not inputs.get("dynamic")
        return CheckpointPrecision("fp8_static" if is_static else "fp8", kv)
    if kind == "int" and bits == 8:
        return CheckpointPrecision("w8a8" if inputs else "int8", kv)
    if kind == "int" and bits == 4:
        return CheckpointPrecision("int4", kv)
    raise _unknown(f"compressed-tensors with weights of {shown(bits)} bits, {shown(kind)}")


def _modelopt(found: Mapping[str, Any]) -> CheckpointPrecision:
    table = found.get("quantization", found)
    table = table if isinstance(table, Mapping) else {}
    algorithm = str(table.get("quant_algo", "")).upper()
    known: dict[str, Quantization] = {
        "FP8": "fp8_static",
        "NVFP4": "nvfp4",
        "W4A16_AWQ": "int4",
        "W4A16": "int4",
        "W8A16": "int8",
        "W8A8_SQ_PER_CHANNEL": "w8a8",
    }
    if algorithm not in known:
        raise _unknown(f"modelopt with {shown(algorithm)}")
    return CheckpointPrecision(known[algorithm], _kv(table))


def _kv(table: Mapping[str, Any]) -> KVPrecision | None:
    scheme, algorithm = table.get("kv_cache_scheme"), str(table.get("kv_cache_quant_algo") or "").upper()
    if isinstance(scheme, Mapping) and scheme.get("num_bits") == 8:
        return "fp8" if scheme.get("type") == "float" else "int8"
    return {"FP8": "fp8", "INT8": "int8"}.get(algorithm)  # type: ignore[return-value] # both are among the words


def _unknown(what: str) -> UsageError:
    return UsageError(
        f"The checkpoint is quantized in a way that cannot be planned: {what}.",
        hint="Plan with the model's 16-bit version and --quantization.",
        code="unsupported_quantization",
        param="quantization_config",
    )
