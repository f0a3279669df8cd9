"""generation_config.json: a checkpoint's defaults for sampling, and the tokens that end an output. No torch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from powerband.core.params import SamplingParams
from powerband.errors import EnvironmentFault, InvalidRequest, UsageError
from powerband.folders import expand_user
from powerband.spec.model.reader import read_config, read_end_token_ids
from powerband.spec.settings import EngineSettings

logger = logging.getLogger(__name__)
FILE = "generation_config.json"
_OFF = ("off", "vllm")  # vLLM's word for its own defaults instead of the file's
# Names in generation_config.json → in SamplingParams. Others (beams, n-grams) belong to transformers' own ways.
_NAMES = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
# Those of them that change an output, and their values that change nothing.
_IGNORED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"), (None, [], {})),
    **dict.fromkeys(("stop_strings", "force_words_ids", "constraints"), (None, [], "")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), (None,)),
    **dict.fromkeys(("top_h", "watermarking_config", "dola_layers"), (None,)),
    "token_healing": (None, False),
    **dict.fromkeys(
        ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (None, 0)
    ),
    **dict.fromkeys(("num_beams", "encoder_repetition_penalty", "typical_p", "guidance_scale"), (None, 1)),
    **dict.fromkeys(("penalty_alpha", "epsilon_cutoff", "eta_cutoff", "diversity_penalty"), (None, 0)),
}
_WHOLE = ("top_k", "max_new_tokens")
SAMPLING_FIELDS = tuple(_NAMES.values())


def sampling_defaults(settings: EngineSettings, folder: Path) -> dict[str, float | int]:
    """Fields of SamplingParams that the checkpoint in `folder`, or the folder that the settings name, gives a value.

    `do_sample: false` is a temperature of 0. A checkpoint from before generation_config.json has them in config.json.
    Raises UsageError naming file and key, EnvironmentFault when the folder has no such file.
    """
    if settings.generation_config in _OFF:
        return {}
    file = sampling_file(settings, folder)
    values = read_config(file)
    ignored = [f"{name}={values[name]!r:.60}" for name, plain in _IGNORED.items() if values.get(name) not in plain]
    if ignored:
        logger.warning("%s: not applied, although transformers' generate() applies it: %s", file, ", ".join(ignored))
    given = {ours: _number(values[theirs], theirs) for theirs, ours in _NAMES.items() if values.get(theirs) is not None}
    if values.get("do_sample") is False:
        given["temperature"] = 0.0
    try:
        SamplingParams(**given)
    except InvalidRequest as error:
        raise UsageError(
            f"{file}: {error.message}",
            hint="Correct the file, or start with --generation-config off.",
            code="bad_generation_config",
            param="generation_config",
        ) from error
    return given


def sampling_file(settings: EngineSettings, folder: Path) -> Path:
    """Where the defaults of sampling stand. Raises EnvironmentFault."""
    file = _file(settings, folder)
    return file if file.exists() else folder / "config.json"


def end_token_ids(settings: EngineSettings, folder: Path, known: tuple[int, ...], vocab_size: int) -> list[int]:
    """The ends that the model's own files name, and those of another generation_config.json, in the vocabulary."""
    more = read_end_token_ids(_file(settings, folder)) if settings.generation_config not in _OFF else ()
    return [id for id in dict.fromkeys((*known, *more)) if id < vocab_size]


def _file(settings: EngineSettings, folder: Path) -> Path:
    if settings.generation_config in ("auto", *_OFF):
        return folder / FILE
    file = expand_user(settings.generation_config) / FILE
    if not file.is_file():
        raise EnvironmentFault(
            f"generation_config is {settings.generation_config!r}, but there is no file {file}.",
            hint="Give a folder that holds it, or 'auto' or 'off'.",
            param="generation_config",
        )
    return file


def _number(value: Any, name: str) -> Any:
    """JSON may write a whole number as 50.0."""
    return int(value) if name in _WHOLE and isinstance(value, float) and value.is_integer() else value
