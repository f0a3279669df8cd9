"""Precision of weights: how a quantized checkpoint stores them, and how an engine holds them in memory.

A checkpoint says how it is stored in `quantization_config`, in the words of the tool that made it:

    gptq                 AutoGPTQ, GPTQModel       4 or 8 bits, groups along the inputs, perhaps in order of activation
    awq                  AutoAWQ                   4 bits, groups, zero points ("gemm" layout)
    compressed-tensors   llm-compressor, vLLM      4 bits in groups, or 8 bits
    mxfp4                gpt-oss                   experts only; expanded while loading
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from powerband.errors import UsageError
from powerband.spec.checkpoint.module_patterns import ModulePatterns
from powerband.spec.config_reader import ConfigReader, shown

Bits = Literal[4, 8]
Method = Literal["gptq", "awq", "compressed-tensors"]
Held = Literal["none", "int8", "int4"]  # none: in the engine's dtype

DEFAULT_GROUP = 128
QUANTIZATION_KEYS = ("quantization_config", "compression_config")  # the second until compressed-tensors 0.6
# Files beside a config.json that say nothing of it, and the methods of the tools that wrote them.
QUANTIZATION_FILES = {
    "quantize_config.json": "gptq",  # AutoGPTQ
    "quant_config.json": "awq",  # AutoAWQ
    "hf_quant_config.json": "modelopt",
}


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How the projections of a quantized checkpoint are stored."""

    method: Method
    bits: Bits
    group_size: int  # inputs that share a scale; 0: all of them
    symmetric: bool  # no zero points
    packed: bool = True  # several values in an int32; else one in an int8
    zeros_minus_one: bool = False  # GPTQ's first format stores one less than each zero point
    ordered: bool = False  # inputs are grouped in order of activation (desc_act, actorder)
    head: bool = False  # whether the head is stored so, too
    ignored: tuple[str, ...] = ()  # modules in 16 bits, as in module_patterns

    def stores(self, module: str) -> bool:
        """Whether a projection is stored in this format, according to the configuration."""
        return not ModulePatterns(self.ignored).match(module)


@dataclass(frozen=True, slots=True)
class WeightPrecisions:
    """What an engine holds projections and head in. Embedding rows, norms and routers are never quantized."""

    layers: Held = "none"
    head: Held = "none"
    group_size: int = DEFAULT_GROUP  # int4
    zeros: bool = False  # int4 with zero points


PLAIN = WeightPrecisions()


def read_weight_format(fields: ConfigReader) -> tuple[str | None, WeightFormat | None]:
    """(method, format) from a configuration's `quantization_config`; the format of mxfp4 and unknown methods is None.

    Raises UsageError for what is known and not supported, naming it.
    """
    table = fields.table("quantization_config") or fields.table("compression_config")
    if table is None:
        return None, None
    method = table.text("quant_method", "compressed-tensors" if "config_groups" in table else "unknown")
    readers = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed_tensors}
    return method, readers[method](table) if method in readers else None


def _gptq(table: ConfigReader) -> WeightFormat:
    layout = table.text("checkpoint_format", table.text("format", "gptq")).lower()  # "format": transformers 5
    if table.boolean("is_marlin_format", False):
        layout = "marlin"
    if layout not in ("gptq", "gptq_v2"):
        raise _unsupported(table, f"GPTQ weights repacked for {shown(layout)}", "checkpoint_format")
    if table.values.get("dynamic"):
        raise _unsupported(table, "GPTQ with different bits or groups for some modules", "dynamic")
    return WeightFormat(
        method="gptq",
        bits=_bits(table, "bits", "GPTQ"),
        group_size=_group_size(table),
        symmetric=table.boolean("sym", True),
        zeros_minus_one=layout == "gptq",
        ordered=table.boolean("desc_act", False),
        head=table.boolean("lm_head", False),
    )


def _awq(table: ConfigReader) -> WeightFormat:
    layout = table.text("version", table.text("checkpoint_format", table.text("format", "gemm"))).lower()
    if table.text("backend", "") == "llm-awq":
        layout = "llm-awq"
    if layout != "gemm":
        raise _unsupported(table, f"AWQ weights in the layout {shown(layout)}", "version")
    # The second names are those of llm-awq and of AutoAWQ's own file.
    bits = _bits(table, "bits" if "bits" in table else "w_bit", "AWQ")
    if bits != 4:
        raise _unsupported(table, "AWQ with 8 bits", "bits")
    group_size = _group_size(table, "group_size" if "group_size" in table else "q_group_size")
    ignored = _patterns(table, "modules_to_not_convert")
    return WeightFormat("awq", bits, group_size, not table.boolean("zero_point", True), ignored=ignored)


def _compressed_tensors(table: ConfigReader) -> WeightFormat:
    layout = table.text("format", "dense")
    groups = table.table("config_groups") or ConfigReader({}, table.source)
    if len(groups.values) != 1:
        problem = f"compressed-tensors with {len(groups.values)} groups of modules"
        raise _unsupported(table, problem, "config_groups")
    group = groups.table(next(iter(groups.values))) or ConfigReader({}, groups.source)
    targets = group.texts("targets") or ["Linear"]
    if targets != ["Linear"]:
        raise _unsupported(table, f"compressed-tensors that names its modules ({shown(targets)})", "targets")
    layout = group.text("format", layout)
    packed = layout == "pack-quantized"
    if layout not in ("pack-quantized", "int-quantized", "naive-quantized"):
        raise _unsupported(table, f"compressed-tensors in the format {shown(layout)}", "format")
    weights = group.table("weights") or ConfigReader({}, group.source)
    if weights.text("type", "int") != "int":
        raise _unsupported(table, f"compressed-tensors with weights of type {shown(weights.values['type'])}", "type")
    strategy = weights.text("strategy", "group" if "group_size" in weights else "tensor")
    if strategy not in ("tensor", "channel", "group"):
        raise _unsupported(table, f"compressed-tensors with one scale per {shown(strategy)}", "strategy")
    sparsity = table.table("sparsity_config")
    if sparsity is not None and sparsity.text("format", "dense") != "dense":
        raise _unsupported(table, "compressed-tensors with sparse weights", "sparsity_config")
    if table.values.get("transform_config"):
        raise _unsupported(table, "compressed-tensors with rotated weights", "transform_config")
    ignored = _patterns(table, "ignore")
    return WeightFormat(
        method="compressed-tensors",
        bits=_bits(weights, "num_bits", "compressed-tensors"),
        group_size=_group_size(weights) if strategy == "group" else 0,
        symmetric=weights.boolean("symmetric", True),
        packed=packed,
        ordered=weights.values.get("actorder") == "group",
        head=not ModulePatterns(ignored).match("lm_head"),
        ignored=ignored,
    )


def _bits(table: ConfigReader, name: str, method: str) -> Bits:
    bits = table.integer(name, 4)
    if bits == 4:
        return 4
    if bits == 8:
        return 8
    raise _unsupported(table, f"{method} with {bits} bits", name)


def _group_size(table: ConfigReader, name: str = "group_size") -> int:
    """0 for one group of all inputs, which the tools write as -1."""
    if table.values.get(name) in (-1, None):
        return 0
    return table.integer(name)


def _patterns(table: ConfigReader, name: str) -> tuple[str, ...]:
    return tuple(table.texts(name) or ())


def _unsupported(table: ConfigReader, what: str, name: str) -> UsageError:
    return UsageError(
        f"{table.source}: {what} cannot be loaded.",
        hint="Use the model's version in 16 bits with --quantization int8 or int4.",
        code="unsupported_quantization",
        param=name,
    )
