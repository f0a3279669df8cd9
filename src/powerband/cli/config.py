"""`powerband config show`: every effective setting and what the model says of generating, each with its origin."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import Any

from powerband.cli.flags import ALL_SETTINGS, Json, takes_settings
from powerband.cli.tables import print_table
from powerband.core.params import SamplingParams
from powerband.errors import PowerbandError
from powerband.folders import expand_user
from powerband.spec.settings import EngineSettings
from powerband.spec.settings_layers import Resolved

HIDDEN = "(set, not shown)"


@takes_settings(*ALL_SETTINGS)
def show(settings: Resolved, *, json: Json = False) -> int:
    """Print every effective setting, its value and where it came from; then the defaults of sampling and the end tokens
    of the model, if it is on this machine.

    Takes the same options as 'powerband serve'.
    """
    values = {name: value for part in settings.values.values() for name, value in asdict(part).items()}
    rows = {
        name: (HIDDEN if value and name == "api_key" else value, settings.origins[name])
        for name, value in values.items()
    } | _checkpoint_settings(settings.engine)
    if json:
        print(json_format.dumps({name: {"value": v, "origin": origin} for name, (v, origin) in rows.items()}, indent=2))
    else:
        print_table([(name, "-" if v is None else str(v), origin) for name, (v, origin) in rows.items()])
    return 0


def _checkpoint_settings(settings: EngineSettings) -> dict[str, tuple[Any, str]]:
    """name → (value, origin) of what counts where a request says nothing; max_tokens None: what the context holds."""
    from powerband.engine.model_loader.generation_config import (
        SAMPLING_FIELDS,
        end_token_ids,
        sampling_defaults,
        sampling_file,
    )
    from powerband.spec.model.reader import read_model_spec
    from powerband.text.tokenizer import Tokenizer

    names = ("eos_token_ids", *SAMPLING_FIELDS)
    folder = _folder(settings)
    if folder is None:
        return dict.fromkeys(names, (None, "known once the model is on this machine"))
    try:
        spec = read_model_spec(folder)
        ends = end_token_ids(settings, folder, spec.eos_token_ids, spec.vocab_size)
        defaults = sampling_defaults(settings, folder)
        tokenizer = Tokenizer.load(settings.tokenizer or folder)
    except PowerbandError as error:
        return dict.fromkeys(names, (None, f"unknown: {error.message}"))
    own = tokenizer.eos_token_id if tokenizer is not None else None
    if own is not None and own < spec.vocab_size and own not in ends:
        ends.append(own)
    plain = {name: getattr(SamplingParams(max_tokens=None), name) for name in SAMPLING_FIELDS}
    given = str(sampling_file(settings, folder))
    return {"eos_token_ids": (ends, "model: config.json, generation_config.json and tokenizer together")} | {
        name: (defaults.get(name, value), given if name in defaults else "default") for name, value in plain.items()
    }


def _folder(settings: EngineSettings) -> Path | None:
    """Where the model lies on this machine; nothing is fetched."""
    from powerband.engine.model_loader.checkpoint import resolve_model

    if settings.model == "demo" or expand_user(settings.model).is_dir():
        return resolve_model(settings)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(settings.model, revision=settings.revision, local_files_only=True))
    except (OSError, ValueError):
        return None
