"""From a folder, a config.json or a mapping to a ModelSpec. Reads numbers and names only; nothing is ever executed."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from powerband.errors import EnvironmentFault, UsageError
from powerband.spec.families import FAMILIES
from powerband.spec.fields import MAX_VOCABULARY, Fields, shown
from powerband.spec.model import ModelSpec
from powerband.spec.quantization import QUANTIZATION_KEYS

_MAX_CONFIG_BYTES = 4 << 20


def read_model_spec(source: Path | str | Mapping[str, Any]) -> ModelSpec:
    """The model that `source` describes: a folder with config.json, the path of one, or its content.

    The token ids that end a text are those of config.json and of a folder's generation_config.json together. The
    family's default counts where neither these nor tokenizer_config.json name one: in another vocabulary it is a word.
    Raises EnvironmentFault when the file is not there, UsageError when what it says cannot be served.
    """
    if isinstance(source, Mapping):
        return _read(source, "config.json")
    path = Path(source)
    if path.is_dir():
        values = read_config(path / "config.json")
        return _with_ends(_read(values, str(path / "config.json")), values, path)
    return _read(read_config(path), str(path))


def _read(values: Mapping[str, Any], source: str) -> ModelSpec:
    fields = _text_part(Fields(values, source))
    model_type = fields.values.get("model_type")
    if not isinstance(model_type, str):
        raise fields.error("it has no 'model_type', so its architecture is unknown", "model_type")
    if model_type not in FAMILIES:
        raise _unknown(fields, model_type)
    return FAMILIES[model_type](fields)


def _text_part(fields: Fields) -> Fields:
    """A multimodal Gemma 3 keeps its language model in `text_config`; some keys only stand outside it."""
    inner = fields.table("text_config") if fields.values.get("model_type") == "gemma3" else None
    if inner is None:
        return fields
    outside = ("tie_word_embeddings", "eos_token_id", "bos_token_id", "dtype", "torch_dtype", *QUANTIZATION_KEYS)
    lifted = {key: fields.values[key] for key in outside if fields.values.get(key) is not None}
    if "dtype" in inner or "torch_dtype" in inner:
        lifted = {key: value for key, value in lifted.items() if key not in ("dtype", "torch_dtype")}
    return Fields({"model_type": "gemma3_text", **inner.values, **lifted}, inner.source)


def _unknown(fields: Fields, model_type: str) -> UsageError:
    nearest = difflib.get_close_matches(model_type, FAMILIES, n=1, cutoff=0.5)
    near = f"The nearest is '{nearest[0]}'. " if nearest else ""
    why = ""
    if "auto_map" in fields.values:
        why = "; it brings Python code of its own (auto_map), which Powerband never runs"
    return UsageError(
        f"{fields.source}: model_type {shown(model_type)} is not supported{why}.",
        hint=f"{near}Supported: {', '.join(FAMILIES)}.",
        code="unsupported_model",
        param="model_type",
    )


def _with_ends(spec: ModelSpec, config: Mapping[str, Any], folder: Path) -> ModelSpec:
    names_end = "eos_token_id" in config or "eos_token_id" in _text_part(Fields(config, "")).values
    ends = read_end_token_ids(folder / "generation_config.json")
    if not names_end and (ends or _names_end(folder / "tokenizer_config.json")):
        return replace(spec, eos_token_ids=ends)
    return replace(spec, eos_token_ids=tuple(dict.fromkeys((*spec.eos_token_ids, *ends))))


def read_end_token_ids(file: Path) -> tuple[int, ...]:
    """eos_token_id of a generation_config.json; empty when there is no file. Raises as read_model_spec."""
    return Fields(read_config(file), str(file)).integers("eos_token_id", high=MAX_VOCABULARY) if file.exists() else ()


def _names_end(tokenizer_config: Path) -> bool:
    return tokenizer_config.exists() and read_config(tokenizer_config).get("eos_token") is not None


def read_config(path: Path) -> dict[str, Any]:
    """The table in a JSON file of a model's folder. Raises EnvironmentFault or UsageError, as read_model_spec."""
    try:
        size = path.stat().st_size
        text = path.read_bytes() if size <= _MAX_CONFIG_BYTES else b""
    except OSError as problem:
        reason = problem.strerror or str(problem)
        hint = "Give a folder that holds config.json, a Hugging Face id, or 'demo'."
        raise EnvironmentFault(f"Cannot read {path}: {reason}.", hint=hint, code="model_not_found") from problem
    if not text:
        raise UsageError(f"{path}: {size} bytes are no model configuration.", code="bad_model_config")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as problem:
        reason = str(problem)[:200]
        raise UsageError(f"{path} is not valid JSON: {reason}.", code="bad_model_config") from problem
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold a JSON object, not {shown(values)}.", code="bad_model_config")
    return values
