"""adapter_config.json as PEFT writes it: which modules an adapter changes, with which rank and scale. No torch.

What would change the result and is not supported is refused by name; what only matters to training is left alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from powerband.documents import read_json_table
from powerband.errors import UsageError
from powerband.spec.checkpoint.module_patterns import Expression
from powerband.spec.config_reader import ConfigReader, shown

FILE = "adapter_config.json"
CODE = "bad_adapter"
ALL_LINEAR = "all-linear"
_MAX_CONFIG_BYTES = 4 << 20
_MAX_PATTERNS = 10_000
_MAX_EXPRESSIONS = 64  # regular expressions among them

# Keys that may have any value: they describe, or matter to training only. Of Linear modules, fan_in_fan_out is ignored
# by PEFT, too.
_NO_EFFECT = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "peft_version",
        "inference_mode",
        "lora_dropout",
        "fan_in_fan_out",
        "megatron_core",
        "megatron_config",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
        "qalora_group_size",
        "ensure_weight_tying",
    ]
)
_READ = frozenset(
    [
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "init_lora_weights",
    ]
)
_REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "A module that was trained whole",
    "lora_bias": "A bias of LoRA layers",
    "target_parameters": "LoRA of parameters, such as those of experts,",
    "trainable_token_indices": "An adapter of single tokens' embeddings",
    "layer_replication": "Replication of layers",
    "alora_invocation_tokens": "Activated LoRA",
    "use_qalora": "QALoRA",
    "arrow_config": "Arrow",
}
# Initialisations that leave the base model as it is. The others (PiSSA, OLoRA, CorDA …) subtract from its weights.
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """One adapter. Module names are those of the base model, as in "model.layers.0.self_attn.q_proj"."""

    source: str
    rank: int
    alpha: float
    use_rslora: bool
    targets: ModuleSelection
    ranks: PatternValues
    alphas: PatternValues

    def rank_of(self, module: str) -> int:
        return int(self.ranks.find(module, self.rank))

    def scale_of(self, module: str) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
        rank, alpha = self.rank_of(module), self.alphas.find(module, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Raises EnvironmentFault when the file is not there, UsageError that names what it holds and is not supported."""
    path = folder / FILE
    values = read_json_table(
        path,
        "adapter's configuration",
        max_bytes=_MAX_CONFIG_BYTES,
        param="lora",
        code=CODE,
        missing_code="adapter_not_found",
        hint=f"A LoRA adapter is a folder with {FILE} and adapter_model.safetensors, as PEFT saves it.",
    )
    return parse_adapter_config(values, str(path))


def parse_adapter_config(values: Mapping[str, Any], source: str) -> AdapterConfig:
    """As `read_adapter_config`, from the file's content."""
    fields = ConfigReader(values, source)
    try:
        _check_supported(fields)
        return AdapterConfig(
            source,
            fields.integer("r", 8),
            fields.number("lora_alpha", 8.0, low=-1e12),
            fields.boolean("use_rslora", False),
            ModuleSelection(fields),
            PatternValues(fields, "rank_pattern"),
            PatternValues(fields, "alpha_pattern"),
        )
    except UsageError as problem:
        raise UsageError(problem.message, hint=problem.hint, code=CODE, param="lora") from None


def _check_supported(fields: ConfigReader) -> None:
    kind = fields.values.get("peft_type")
    if kind != "LORA":
        raise fields.error(f"its peft_type is {shown(kind)}; only LORA is supported", "peft_type")
    bias = fields.text("bias", "none")
    if bias != "none":
        raise fields.error(
            f"'bias' is {shown(bias)}: biases of the base model that were trained are not supported", "bias"
        )
    start = fields.values.get("init_lora_weights", True)
    if not any(start is known or (isinstance(start, str) and start == known) for known in _KEEPS_BASE):
        hint = "Convert it once with PEFT: save_pretrained(…, path_initial_model_for_weight_conversion=…)."
        raise fields.error(
            f"'init_lora_weights' is {shown(start)}, which changes the base model's weights, and is not supported",
            "init_lora_weights",
            hint,
        )
    for name, value in values_that_ask(fields.values):
        what = _REFUSED.get(name, "It")
        raise fields.error(f"'{name}' is {shown(value)}. {what} is not supported", name)


def values_that_ask(values: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Keys that are not known to be harmless, with a value that switches something on: true, or anything in a list."""
    for name, value in values.items():
        asks = value is True or (isinstance(value, list | dict | tuple | str) and bool(value))
        if (name in _REFUSED and value not in (None, False, [], {}, "")) or (
            name not in _NO_EFFECT and name not in _READ and name not in _REFUSED and asks
        ):
            yield name, value


class ModuleSelection:
    """Which modules target_modules, exclude_modules and layers_to_transform select, as PEFT does it."""

    def __init__(self, fields: ConfigReader) -> None:
        self._fields = fields
        self._layers = frozenset(fields.integers("layers_to_transform", high=10_000))
        self._is_text = isinstance(fields.values.get("target_modules"), str)
        self._targets = self._names("target_modules")
        self._excluded = self._names("exclude_modules")

    def selects(self, module: str) -> bool | None:
        """None: it is not known, because the expression is not one that can be evaluated in bounded time."""
        excluded = _is_named(self._excluded, module)
        if excluded:
            return False
        found = _is_named(self._targets, module)
        if not found or excluded is None or self._is_text or not self._layers:
            return None if excluded is None and found else found
        return layer_of(module) in self._layers

    def _names(self, key: str) -> _Names:
        value = self._fields.values.get(key)
        if value is None:
            return frozenset()
        if isinstance(value, str):
            return ALL_LINEAR if value.lower() == ALL_LINEAR else _expression(f"(?:{value})$")
        names = self._fields.texts(key) or []
        if len(names) > _MAX_PATTERNS:
            raise self._fields.error(f"'{key}' names {len(names)} modules; at most {_MAX_PATTERNS}", key)
        return frozenset(names)


_Names = frozenset[str] | Expression | str | None  # names, an expression, all linear modules, or what is not understood


def _is_named(names: _Names, module: str) -> bool | None:
    if isinstance(names, Expression):
        return names.match(module)
    if isinstance(names, frozenset):
        return not names.isdisjoint(_endings(module))
    return None if names is None else True


def layer_of(module: str) -> int:
    """The number in the first part "layers.N" of a name; -1 if there is none."""
    parts = module.split(".")
    for before, part in itertools.pairwise(parts):
        if part.isdecimal() and before == "layers":
            return int(part)
    return -1


@dataclass(slots=True)
class PatternValues:
    """rank_pattern or alpha_pattern: numbers by the end of a name, or a regular expression for it. The first counts."""

    fields: ConfigReader
    key: str
    _names: dict[str, tuple[int, float]] = field(default_factory=dict)  # ending: place, value
    _expressions: list[tuple[int, Expression, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        table = self.fields.table(self.key)
        if table is None:
            return
        if len(table.values) > _MAX_PATTERNS:
            raise self.fields.error(f"'{self.key}' has {len(table.values)} entries; at most {_MAX_PATTERNS}", self.key)
        for place, pattern in enumerate(table.values):
            value = table.integer(pattern) if self.key == "rank_pattern" else table.number(pattern, low=-1e12)
            if pattern.replace("_", "").replace(".", "").replace("-", "").isalnum():
                self._names.setdefault(pattern, (place, value))
                continue
            begins = pattern.startswith("^")
            text = f"(?:{pattern.removeprefix('^')})$"
            expression = _expression(text if begins else rf"(?:.*\.)?{text}")
            if expression is None or len(self._expressions) >= _MAX_EXPRESSIONS:
                problem = f"'{self.key}' has the expression {shown(pattern)}, which is not understood"
                if expression is not None:
                    problem = f"'{self.key}' has more than {_MAX_EXPRESSIONS} regular expressions"
                raise self.fields.error(problem, self.key, "Write the names of modules.")
            self._expressions.append((place, expression, value))

    def find(self, module: str, default: float) -> float:
        """The value for a module."""
        found = [self._names[ending] for ending in _endings(module) if ending in self._names]
        found += [(place, value) for place, expression, value in self._expressions if expression.match(module)]
        return min(found)[1] if found else default


def _endings(module: str) -> list[str]:
    """'a.b.c' → 'a.b.c', 'b.c', 'c'."""
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _expression(text: str) -> Expression | None:
    """None: it is not understood."""
    try:
        return Expression(f"re:{text}")
    except UsageError:
        return None
