"""Where a checkpoint lies: a name becomes a folder, and a folder the safetensors files in it. No torch."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from powerband.errors import EnvironmentFault, UsageError
from powerband.spec.settings import EngineSettings

# What is fetched from the hub: never pickled weights, never code.
FETCHED = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja", "*.txt")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve_model(settings: EngineSettings) -> Path:
    """The folder of the model that the settings name: in the package, on this machine, or fetched from the hub.

    Everything fetched is of one revision. Raises EnvironmentFault.
    """
    name = settings.model
    if name == "demo" and not Path(name).is_dir():
        return Path(str(files("powerband") / "demo"))
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.count("/") != 1 or name.startswith((".", "~")):
        raise EnvironmentFault(
            f"There is no folder {name!r}.",
            hint="Give a folder with config.json and safetensors, a Hugging Face id (owner/name), or 'demo'.",
            code="model_not_found",
            param="model",
        )
    dummy = settings.load_format == "dummy"
    return _fetch(name, settings.revision, [kind for kind in FETCHED if not (dummy and kind == "*.safetensors")])


def _fetch(name: str, revision: str | None, kinds: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=kinds))
    except GatedRepoError as problem:
        raise _not_to_be_had(
            name, "access to it must be granted first", "Ask for it on its page, then set HF_TOKEN."
        ) from problem
    except RevisionNotFoundError as problem:
        raise _not_to_be_had(
            name, f"it has no revision {revision!r}", "Name a branch, tag or commit that exists."
        ) from problem
    except (RepositoryNotFoundError, HFValidationError) as problem:
        raise _not_to_be_had(
            name, "there is no such model", "Check the name; a private one needs HF_TOKEN."
        ) from problem
    except LocalEntryNotFoundError as problem:
        hint = "Connect, or fetch it once with 'hf download' and give the folder."
        raise _not_to_be_had(name, "the hub cannot be reached, and it was not fetched before", hint) from problem
    except (HfHubHTTPError, OSError) as problem:
        reason = (str(problem).splitlines() or [type(problem).__name__])[0][:200]
        raise _not_to_be_had(name, reason, "Try again, or give a folder.") from problem


def _not_to_be_had(name: str, reason: str, hint: str) -> EnvironmentFault:
    message = f"{name!r} is no folder here and cannot be had from the Hugging Face hub: {reason}."
    return EnvironmentFault(message, hint=hint, code="model_not_found", param="model")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, as its index lists them. Raises EnvironmentFault or UsageError."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return _indexed_files(folder, index)
    single = folder / "model.safetensors"
    found = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if found:
        return found
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise EnvironmentFault(
            f"{folder} holds only pickled weights ({pickled[0]}), which can run code and are never loaded.",
            hint="Use the model's safetensors version, or convert it once with transformers' save_pretrained.",
            code="pickled_weights",
            param="model",
        )
    raise EnvironmentFault(
        f"{folder} holds no safetensors file.",
        hint="Give a folder with model.safetensors, or use --load-format dummy for random weights.",
        code="weights_not_found",
        param="model",
    )


def _indexed_files(folder: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        inside = all(Path(name).name == name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise unreadable(index, problem) from problem
    if not inside:
        raise UsageError(f"{index} names files outside its folder.", code="bad_weights")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise EnvironmentFault(
            f"{folder} lacks {missing[0]}, one of {len(names)} files that its index names.",
            hint="The download is incomplete; fetch it again.",
            code="weights_not_found",
            param="model",
        )
    return [folder / name for name in names]


def unreadable(path: Path, problem: Exception) -> EnvironmentFault:
    """The error for a file that is damaged, whatever the library said."""
    reason = str(problem)[:300] or type(problem).__name__
    return EnvironmentFault(
        f"{path} cannot be read: {reason}.",
        hint="The file is damaged or incomplete; fetch it again.",
        code="bad_weights",
    )
