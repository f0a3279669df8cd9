"""From a folder, a config.json or a mapping to a ModelSpec. Reads numbers and names only; nothing is ever executed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from powerband.documents import read_json_table
from powerband.errors import UsageError
from powerband.spec.families import FAMILIES
from powerband.spec.fields import MAX_VOCABULARY, Fields, shown
from powerband.spec.model import ModelSpec
from powerband.spec.quantization import QUANTIZATION_KEYS

_MAX_CONFIG_BYTES = 4 << 20


def read_model_spec(source: Path | str | Mapping[str, Any]) -> ModelSpec:
    """The model that `source` describes: a folder with config.json, the path of one, or its content.

    A folder's generation_config.json, when there is one, replaces the token ids that end a text.
    Raises EnvironmentFault when the file is not there, UsageError when what it says cannot be served.
    """
    if isinstance(source, Mapping):
        return _read(source, "config.json")
    path = Path(source)
    if path.is_dir():
        spec = _read(read_config(path / "config.json"), str(path / "config.json"))
        generation = path / "generation_config.json"
        return _with_ending(spec, Fields(read_config(generation), str(generation))) if generation.exists() else spec
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


def _with_ending(spec: ModelSpec, generation: Fields) -> ModelSpec:
    ids = generation.integers("eos_token_id", high=MAX_VOCABULARY)
    return replace(spec, eos_token_ids=ids) if ids else spec


def read_config(path: Path) -> dict[str, Any]:
    """The table in a JSON file of a model's folder. Raises EnvironmentFault or UsageError, as read_model_spec."""
    return read_json_table(
        path,
        "model configuration",
        max_bytes=_MAX_CONFIG_BYTES,
        code="bad_model_config",
        missing_code="model_not_found",
        hint="Give a folder that holds config.json, a Hugging Face id, or 'demo'.",
    )
