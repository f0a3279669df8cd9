"""From a folder, a config.json or a mapping to a ModelSpec. Reads numbers and names only; nothing is ever executed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from powerband.documents import read_json_table
from powerband.errors import UsageError
from powerband.spec.checkpoint.files import has_own_head
from powerband.spec.checkpoint.quantization import QUANTIZATION_FILES, QUANTIZATION_KEYS
from powerband.spec.config_reader import MAX_POSITIONS, ConfigReader, shown
from powerband.spec.model.families import FAMILIES
from powerband.spec.model.model_spec import ModelSpec
from powerband.spec.model.pooling import last_token, pooling_of_config, read_max_tokens, read_pooling
from powerband.spec.model.rope import scaled_context

_MAX_CONFIG_BYTES = 4 << 20
_CONFIG = "config.json"


def read_model_spec(source: Path | str | Mapping[str, Any]) -> ModelSpec:
    """The model that `source` describes: a folder with config.json, the path of one, or its content.

    The token ids that end a text are those of config.json and of a folder's generation_config.json together. The
    family's default counts where neither these nor tokenizer_config.json name one: in another vocabulary it is a word.
    The weights of a folder, if there are any, show whether the head is the embedding.
    Raises EnvironmentFault when the file is not there, UsageError when what it says cannot be served.
    """
    if isinstance(source, Mapping):
        return _read(source, "config.json")
    path = Path(source)
    if path.is_dir():
        config = path / _CONFIG
        values = read_model_config(config)
        spec = _with_modules(_read(values, str(config)), values, path)
        return _with_ends(with_stored_head(spec, config), values, path)
    return with_stored_head(_read(read_model_config(path), str(path)), path)


def read_model_config(path: Path) -> dict[str, Any]:
    """A config.json, with what a file of an older quantization tool beside it says of the weights' precision.

    Raises EnvironmentFault or UsageError, as read_model_spec.
    """
    values = read_config(path)
    if path.name != _CONFIG or any(values.get(key) is not None for key in QUANTIZATION_KEYS):
        return values
    for name, method in QUANTIZATION_FILES.items():
        beside = path.with_name(name)
        if beside.exists():
            found = read_config(beside)
            if name == "quantize_config.json" and "w_bit" in found:
                method = "awq"
            return {**values, QUANTIZATION_KEYS[0]: {"quant_method": method, **found}}
    return values


def with_stored_head(spec: ModelSpec, config: Path) -> ModelSpec:
    """The model as the weights beside its config.json have it: a head of its own is not tied, whatever that says."""
    is_own = spec.generates and spec.tie_embeddings and config.name == _CONFIG and has_own_head(config.parent)
    return replace(spec, tie_embeddings=False) if is_own else spec


def _read(values: Mapping[str, Any], source: str) -> ModelSpec:
    fields = _text_part(ConfigReader(values, source))
    model_type = fields.values.get("model_type")
    if not isinstance(model_type, str):
        raise fields.error("it has no 'model_type', so its architecture is unknown", "model_type")
    if model_type not in FAMILIES:
        raise _unknown(fields, model_type)
    spec = _with_scaled_context(FAMILIES[model_type](fields), fields)
    pooling = pooling_of_config(fields, spec.hidden_size, is_encoder=spec.encoder is not None)
    if pooling is None:
        return spec
    if pooling == last_token(spec.hidden_size) and spec.tie_embeddings:  # the head is there, whatever it was saved as
        return replace(spec, pooling=pooling)
    return replace(spec, pooling=pooling, generates=False, tie_embeddings=True)


def _with_modules(spec: ModelSpec, config: Mapping[str, Any], folder: Path) -> ModelSpec:
    """A checkpoint of sentence-transformers embeds and does not generate: its head, if it has one, is not needed."""
    pooling = read_pooling(folder, spec.hidden_size, config)
    if pooling is None:
        return spec if spec.generates else _with_max_tokens(spec, folder)
    return _with_max_tokens(replace(spec, pooling=pooling, generates=False, tie_embeddings=True), folder)


def _with_max_tokens(spec: ModelSpec, folder: Path) -> ModelSpec:
    return replace(spec, max_position=min(spec.max_position, read_max_tokens(folder) or spec.max_position))


def converted(spec: ModelSpec, convert: Literal["auto", "embed"]) -> ModelSpec:
    """The model as the setting `convert` has it. Raises UsageError where prompts already become something else."""
    if convert == "auto" or (spec.pooling is not None and spec.pooling.task == "embed"):
        return spec
    if spec.pooling is not None:
        raise UsageError(
            "convert is 'embed', but the checkpoint is a classifier, which gives scores.",
            hint="Leave it out, and use /v1/score or /v1/rerank.",
            param="convert",
        )
    return replace(spec, pooling=last_token(spec.hidden_size))


def _with_scaled_context(spec: ModelSpec, fields: ConfigReader) -> ModelSpec:
    """Gemma 3 alone has layers of different contexts; its configurations say the longest."""
    ropes = {layer.rope for layer in spec.layers if layer.rope is not None}
    if spec.family == "gemma3":
        if len([rope for rope in ropes if rope.scaling in ("dynamic", "longrope")]) > 1:
            raise fields.error("two kinds of layers rotate by the length of a sequence", "rope_parameters")
        return spec
    length = max([spec.max_position, *(scaled_context(rope, spec.max_position) for rope in ropes)])
    if length > MAX_POSITIONS:
        raise fields.error(f"rope scaling makes a context of {shown(length)}; at most {MAX_POSITIONS}", "factor")
    return replace(spec, max_position=length)


def _text_part(fields: ConfigReader) -> ConfigReader:
    """A multimodal Gemma 3 keeps its language model in `text_config`; some keys only stand outside it."""
    inner = fields.table("text_config") if fields.values.get("model_type") == "gemma3" else None
    if inner is None:
        return fields
    outside = ("tie_word_embeddings", "eos_token_id", "bos_token_id", "dtype", "torch_dtype", *QUANTIZATION_KEYS)
    lifted = {key: fields.values[key] for key in outside if fields.values.get(key) is not None}
    if "dtype" in inner or "torch_dtype" in inner:
        lifted = {key: value for key, value in lifted.items() if key not in ("dtype", "torch_dtype")}
    return ConfigReader({"model_type": "gemma3_text", **inner.values, **lifted}, inner.source)


def _unknown(fields: ConfigReader, model_type: str) -> UsageError:
    nearest = difflib.get_close_matches(model_type, FAMILIES, n=1, cutoff=0.5)
    near = f"The nearest is '{nearest[0]}'. " if nearest else ""
    why = ""
    if "auto_map" in fields.values:
        why = "; it brings Python code of its own (auto_map), which Powerband never runs"
    return UsageError(
        f"{fields.source}: model_type {shown(model_type)} is not supported{why}.",
        hint=f"{near}Supported: {', '.join(FAMILIES)}. Where another engine runs the model, a plan that is written by "
        "hand deploys it (docs/plan-file.md; device: cpu, or a GPU of 'powerband devices').",
        code="unsupported_model",
        param="model_type",
    )


def _with_ends(spec: ModelSpec, config: Mapping[str, Any], folder: Path) -> ModelSpec:
    names_end = "eos_token_id" in config or "eos_token_id" in _text_part(ConfigReader(config, "")).values
    ends = read_end_token_ids(folder / "generation_config.json")
    if not names_end and (ends or _names_end(folder / "tokenizer_config.json")):
        return replace(spec, eos_token_ids=ends)
    return replace(spec, eos_token_ids=tuple(dict.fromkeys((*spec.eos_token_ids, *ends))))


def read_end_token_ids(file: Path) -> tuple[int, ...]:
    """eos_token_id of a generation_config.json; empty when there is no file. Raises as read_model_spec."""
    return ConfigReader(read_config(file), str(file)).token_ids("eos_token_id") if file.exists() else ()


def _names_end(tokenizer_config: Path) -> bool:
    return tokenizer_config.exists() and read_config(tokenizer_config).get("eos_token") is not None


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
