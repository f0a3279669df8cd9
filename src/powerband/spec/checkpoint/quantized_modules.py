"""What a quantized checkpoint quantizes, module by module, and the sizes that its scales fix.

Read from `quantization_config` for planning with any engine; what our own engine loads is `quantization.WeightFormat`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from powerband.errors import UsageError
from powerband.spec.checkpoint.module_patterns import ModulePatterns
from powerband.spec.config_reader import MAX_WIDTH, shown

_METHODS_WITH_QUANTIZED_HEADS = ("compressed-tensors", "modelopt")  # unless the head is among what they leave out


@dataclass(frozen=True, slots=True)
class QuantizedModules:
    """Patterns as in module_patterns. A rank's share of a matrix has to hold whole blocks of scales."""

    ignored: tuple[str, ...] = ()  # modules in 16 bits
    only: tuple[str, ...] = ()  # all others are in 16 bits; empty: every projection is quantized
    head: bool = False
    block_outputs: int = 1  # outputs of a matrix that share a scale, or a word in memory
    block_inputs: int = 1  # inputs that share a scale; 1: all of them, or each its own

    def stores(self, *names: str) -> bool:
        """Whether a projection is quantized; it may have several names, as families and engines fuse projections."""
        ignored, only = _compiled(self.ignored), _compiled(self.only)
        return not any(map(ignored.match, names)) and (not self.only or any(map(only.match, names)))


@cache
def _compiled(patterns: tuple[str, ...]) -> ModulePatterns:
    return ModulePatterns(patterns)


def read_quantized_modules(table: Mapping[str, Any], method: str) -> QuantizedModules:
    """From a `quantization_config` and its method, in lower case. Raises UsageError for what is not understood."""
    if method == "modelopt" and isinstance(table.get("quantization"), Mapping):
        table = table["quantization"]
    ignored, only = _ignored(table), _only(table)
    outputs, inputs = _block(table, method)
    head = table.get("lm_head") is True or method in _METHODS_WITH_QUANTIZED_HEADS
    found = QuantizedModules(ignored, only, False, outputs, inputs)
    is_head_stored = head and found.stores("lm_head")
    return QuantizedModules(ignored, only, is_head_stored, outputs, inputs)


def _ignored(table: Mapping[str, Any]) -> tuple[str, ...]:
    listed = [
        name
        for key in ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules")
        for name in _texts(table, key)
    ]
    # GPTQModel's rules by module: those that begin with '-:' leave it out.
    dynamic = table.get("dynamic")
    rules = dynamic if isinstance(dynamic, Mapping) else {}
    listed += [f"re:{rule[2:]}" for rule in rules if isinstance(rule, str) and rule.startswith("-:")]
    return tuple(dict.fromkeys(listed))


def _only(table: Mapping[str, Any]) -> tuple[str, ...]:
    """AutoGPTQ's modules_in_block_to_quantize, or targets of compressed-tensors that are no classes."""
    blocks = table.get("modules_in_block_to_quantize")
    if isinstance(blocks, list):
        nested = [name for block in blocks for name in (block if isinstance(block, list) else [block])]
        return _texts({"modules_in_block_to_quantize": nested}, "modules_in_block_to_quantize")
    targets = _texts(_group(table), "targets")
    return () if any(target[:1].isupper() for target in targets) else targets  # 'Linear' is all of them


def _block(table: Mapping[str, Any], method: str) -> tuple[int, int]:
    """(outputs, inputs) that a rank's share of a matrix has to be multiples of."""
    if method.startswith(("gptq", "awq")):
        bits = _size(table, "bits" if "bits" in table else "w_bit", 4)
        return max(32 // bits, 1), _size(table, "group_size" if "group_size" in table else "q_group_size", 1)
    if method == "fp8":
        return _pair(table.get("weight_block_size"))
    if method == "compressed-tensors":
        weights = _group(table).get("weights")
        weights = weights if isinstance(weights, Mapping) else {}
        if weights.get("strategy") == "block":
            return _pair(weights.get("block_structure"))
        return 1, _size(weights, "group_size", 1)
    if method == "modelopt":
        algorithm = str(table.get("quant_algo", "")).upper()
        return 1, _size(table, "group_size", {"NVFP4": 16, "W4A16_AWQ": 128}.get(algorithm, 1))
    return 1, 1


def _group(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first group of modules of compressed-tensors."""
    groups = table.get("config_groups")
    group = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    return group if isinstance(group, Mapping) else {}


def _pair(value: Any) -> tuple[int, int]:
    """[128, 128], or '128x128' as compressed-tensors wrote it at first; absent: (1, 1)."""
    if value is None:
        return 1, 1
    items = value.split("x") if isinstance(value, str) else value
    if not isinstance(items, list) or len(items) != 2:
        raise _wrong("block", value)
    rows, columns = ({"size": int(item) if isinstance(item, str) and item.isdecimal() else item} for item in items)
    return _size(rows, "size", 1), _size(columns, "size", 1)


def _size(table: Mapping[str, Any], name: str, default: int) -> int:
    """-1 and 0 are what the tools write for all inputs in one group."""
    value = table.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value <= MAX_WIDTH:
        raise _wrong(name, value)
    return max(value, 1)


def _texts(table: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = table.get(name)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _wrong(name, value)
    return tuple(value)


def _wrong(name: str, value: Any) -> UsageError:
    return UsageError(
        f"quantization_config: '{name}' is {shown(value)}.",
        hint="Fetch the model's config.json again.",
        code="bad_model_config",
        param=name,
    )
