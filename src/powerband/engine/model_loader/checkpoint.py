"""Finds a checkpoint: a name becomes a folder, fetched from the hub if it is not on this machine. No torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from powerband.errors import EnvironmentFault
from powerband.folders import expand_user
from powerband.spec.checkpoint.files import (
    INDEX,
    SET_ASIDE,
    choose,
    indexed_files,
    nothing_to_load,
    weight_files,
)
from powerband.spec.model.pooling import module_folders
from powerband.spec.model.reader import converted, read_model_spec
from powerband.spec.settings import EngineSettings

# What is fetched from the hub beside weights: never pickles, never code.
FETCHED = ("*.json", "tokenizer.model", "*.jinja", "*.txt")
# Folders of a repository hold the same weights in other layouts (original/, onnx/), only templates are needed of them.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
NOT_FETCHED = ("*/*.safetensors", "*/*.json", "*/*.txt", *SET_ASIDE)


def resolve_model(settings: EngineSettings) -> Path:
    """The folder of the model that the settings name: in the package, on this machine, or fetched from the hub.

    Everything fetched is of one revision. Raises EnvironmentFault.
    """
    name = settings.model
    if (local := _local_model(name)) is not None:
        return local
    revision, weights = settings.revision, settings.load_format != "dummy"
    folder = _fetch(name, revision, lambda: [*FETCHED, *(_weights(name, revision) if weights else ())], NOT_FETCHED)
    if modules := module_folders(folder):  # of sentence-transformers: poolings and projections
        endings = ("config.json", "model.safetensors") if weights else ("config.json",)
        return _fetch(name, revision, lambda: [f"{module}/{ending}" for module in modules for ending in endings], ())
    return folder


def check_local_model(settings: EngineSettings) -> None:
    """Check what can be seen without torch and network: that a model on this machine is there, of a supported family,
    and has weights. Raises EnvironmentFault and UsageError, as loading it would.
    """
    folder = _local_model(settings.model)
    if folder is None:
        return
    converted(read_model_spec(folder), settings.convert)
    if settings.load_format != "dummy":
        weight_files(folder)


def _local_model(name: str) -> Path | None:
    """The folder of a model in the package or on this machine; None: the name is one of the hub's.

    Raises EnvironmentFault for a name that is neither.
    """
    if name == "demo" and not _is_folder(Path(name)):
        return Path(str(files("powerband") / "demo"))
    path = expand_user(name)
    if _is_folder(path):
        return path
    if _is_hub_id(name):
        return None
    raise EnvironmentFault(
        f"There is no folder {name!r}.",
        hint="Give a folder with config.json and safetensors, a Hugging Face id (owner/name), or 'demo'.",
        code="model_not_found",
        param="model",
    )


def resolve_adapter(name: str) -> Path:
    """The folder of a LoRA adapter: on this machine, or fetched from the hub. Raises EnvironmentFault."""
    path = expand_user(name)
    if _is_folder(path):
        return path
    if not _is_hub_id(name):
        raise EnvironmentFault(
            f"There is no folder {name!r}.",
            hint=f"Give a folder with {' and '.join(ADAPTER_FILES)}, or a Hugging Face id (owner/name).",
            code="adapter_not_found",
            param="lora",
        )
    try:
        return _fetch(name, None, lambda: list(ADAPTER_FILES), ())
    except EnvironmentFault as problem:
        raise EnvironmentFault(problem.message, hint=problem.hint, code="adapter_not_found", param="lora") from problem


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # its name is too long, or it may not be looked at
        return False


def _is_hub_id(name: str) -> bool:
    return not Path(name).is_absolute() and name.count("/") == 1 and not name.startswith((".", "~"))


def _fetch(name: str, revision: str | None, kinds: Callable[[], list[str]], without: tuple[str, ...]) -> Path:
    """kinds: patterns of files, found out where the hub's errors become ours."""
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
        return Path(snapshot_download(name, revision=revision, allow_patterns=kinds(), ignore_patterns=list(without)))
    except GatedRepoError as problem:
        raise _not_available(
            name, "access to it must be granted first", "Ask for it on its page, then set HF_TOKEN."
        ) from problem
    except RevisionNotFoundError as problem:
        raise _not_available(
            name, f"it has no revision {revision!r}", "Name a branch, tag or commit that exists."
        ) from problem
    except (RepositoryNotFoundError, HFValidationError) as problem:
        raise _not_available(
            name, "there is no such model", "Check the name; a private one needs HF_TOKEN."
        ) from problem
    except LocalEntryNotFoundError as problem:
        hint = "Connect, or fetch it once with 'hf download' and give the folder."
        raise _not_available(name, "the hub cannot be reached, and it was not fetched before", hint) from problem
    except (HfHubHTTPError, _no_connection(), OSError) as problem:
        reason = (str(problem).splitlines() or [type(problem).__name__])[0][:200]
        raise _not_available(name, reason, "Try again, or give a folder.") from problem


def _weights(name: str, revision: str | None) -> list[str]:
    """The files of weights that will be loaded, by the rule for a folder on this machine. Raises EnvironmentFault.

    All safetensors when the hub does not list its files now: what was fetched before may do.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        names = [sibling.rfilename for sibling in HfApi().model_info(name, revision=revision).siblings or ()]
        index = Path(hf_hub_download(name, INDEX, revision=revision)) if INDEX in names else None
    except (HfHubHTTPError, HFValidationError, _no_connection(), OSError):
        return ["*.safetensors"]
    top = [file for file in names if "/" not in file]
    chosen = choose(top, indexed_files(index) if index is not None else None)
    if not chosen:
        raise nothing_to_load(f"{name!r} on the Hugging Face hub", top)
    return chosen


def _no_connection() -> type[Exception]:
    """What the hub's HTTP client raises where it gets no answer; the client differs between versions of the library."""
    from huggingface_hub import errors

    found: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # imported there, from the client
    return found


def _not_available(name: str, reason: str, hint: str) -> EnvironmentFault:
    message = f"{name!r} is not a folder here and cannot be fetched from the Hugging Face hub: {reason}."
    return EnvironmentFault(message, hint=hint, code="model_not_found", param="model")
