"""One loader for every setting: command line, then environment, then file, then default. Each value keeps its origin.

powerband serve demo --max-num-seqs 8            command line
POWERBAND_MAX_NUM_SEQS=8 powerband serve demo    environment
powerband serve demo --config powerband.yaml     file, with the line  max_num_seqs: 8
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgspec

from powerband.documents import read_table
from powerband.errors import UsageError
from powerband.renamed import new_names, option, warn_renamed
from powerband.service_links import is_service_link
from powerband.spec.config_reader import shown
from powerband.spec.settings import EngineSettings, value_types

PREFIX = "POWERBAND_"
# Read elsewhere, not settings.
OTHER_VARIABLES = (
    *("POWERBAND_DEBUG", "POWERBAND_CACHE", "POWERBAND_KERNEL_TIER", "POWERBAND_KERNEL_SANITIZE"),
    *("POWERBAND_VLLM", "POWERBAND_SGLANG", "POWERBAND_TRTLLM"),
    *("POWERBAND_STATE", "POWERBAND_MEMBER", "POWERBAND_DEVICE_PROFILE", "POWERBAND_HERE", "POWERBAND_CONTROLLER"),
)
FROM_COMMAND_LINE = "command line"
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Resolved:
    """Effective settings by class, and where each value came from (setting → origin)."""

    values: Mapping[type, Any]
    origins: Mapping[str, str]

    @property
    def engine(self) -> EngineSettings:
        engine: EngineSettings = self.values[EngineSettings]
        return engine

    @property
    def asked(self) -> set[str]:
        """Settings that were set, in any layer."""
        return {name for name, origin in self.origins.items() if origin != DEFAULT}


def resolve(
    classes: Iterable[type],
    known: Iterable[type],
    given: Mapping[str, Any],
    environment: Mapping[str, str],
    file: Path | None,
) -> Resolved:
    """Merge the layers for `classes`.

    known: every settings class, so that one file or environment can serve all commands; a name that none of them has
    is a UsageError with the nearest that one has.
    """
    types = {name: declared for settings in known for name, declared in value_types(settings).items()}
    renamed = {old: new for settings in known for old, new in new_names(settings).items()}
    layers = [
        _from_command_line(given, renamed),
        _from_environment(environment, types, renamed),
        _from_file(file, types, renamed) if file else {},
    ]
    values: dict[type, Any] = {}
    origins: dict[str, str] = {}
    for settings in classes:
        chosen: dict[str, Any] = {}
        for item in fields(settings):
            layer = next((layer for layer in layers if item.name in layer), None)
            origins[item.name] = DEFAULT
            if layer is not None:
                chosen[item.name], origins[item.name] = layer[item.name]
        values[settings] = _build(settings, chosen, origins)
    return Resolved(values, origins)


def _build(settings: type, chosen: dict[str, Any], origins: dict[str, str]) -> Any:
    try:
        return settings(**chosen)
    except UsageError as error:
        origin = origins.get(error.param or "", DEFAULT)
        if origin == DEFAULT:
            raise
        raise UsageError(
            error.message, hint=f"{error.hint} It came from the {origin}.".strip(), param=error.param
        ) from None


_Layer = dict[str, tuple[Any, str]]  # setting → value, origin


def _from_command_line(given: Mapping[str, Any], renamed: Mapping[str, str]) -> _Layer:
    new_names = _with_new_names(given, renamed, option)
    return {new_names[name]: (given[name], FROM_COMMAND_LINE) for name in new_names}


def check_variables(environment: Mapping[str, str], known: Iterable[type]) -> None:
    """Raises UsageError for a variable that looks like a setting and is none. known: as in `resolve`."""
    names = [name for settings in known for name in (*value_types(settings), *new_names(settings))]
    _variables(environment, names)


def _variables(environment: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
    """Setting → text. Raises UsageError for a variable that is no setting, with the nearest that is one."""
    given: dict[str, str] = {}
    for variable, text in environment.items():
        if not variable.startswith(PREFIX) or variable in OTHER_VARIABLES or is_service_link(variable, text):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if variable != _variable(name) or name not in names:
            raise UsageError(
                f"The environment variable {variable} is not one that Powerband knows.",
                hint=nearest(variable, [*map(_variable, names), *OTHER_VARIABLES]),
            )
        given[name] = text
    return given


def _from_environment(environment: Mapping[str, str], types: Mapping[str, Any], renamed: Mapping[str, str]) -> _Layer:
    given = _variables(environment, [*types, *renamed])
    new_names = _with_new_names(given, renamed, _variable)
    return {
        new: (_convert(given[name], types[new]), f"environment ({_variable(name)})") for name, new in new_names.items()
    }


def _variable(name: str) -> str:
    return PREFIX + name.upper()


def _from_file(path: Path, types: Mapping[str, Any], renamed: Mapping[str, str]) -> _Layer:
    given: dict[str, Any] = {}
    for key, value in read_table(path, "settings file").items():
        name = str(key).replace("-", "_")
        if name not in types and name not in renamed:
            raise UsageError(f"{shown(key)} in {path} is not a setting.", hint=nearest(name, types))
        if value is not None:
            given[name] = value
    new_names = _with_new_names(given, renamed, lambda name: f"{name} in {path}")
    return {new: (_convert(given[name], types[new]), f"file ({path})") for name, new in new_names.items()}


def _with_new_names(given: Iterable[str], renamed: Mapping[str, str], written: Callable[[str], str]) -> dict[str, str]:
    """Name as given → name of the setting, the old names first, so that a value under the new name wins.

    written: how warnings write a name.
    """
    for old in (name for name in given if name in renamed):
        warn_renamed(written(old), written(renamed[old]))
    return {name: renamed.get(name, name) for name in sorted(given, key=lambda name: name not in renamed)}


def _convert(value: Any, declared: Any) -> Any:
    """A value as text or YAML gives it, in the declared type; as it is when that fails, for the check to name.

    Of several texts in one, commas stand between.
    """
    if declared == tuple[str, ...] and isinstance(value, str):
        return tuple(part for text in value.split(",") if (part := text.strip()))
    try:
        return msgspec.convert(value, declared, strict=not isinstance(value, str))
    except msgspec.ValidationError:
        return value


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest known name, if one is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"Did you mean {close[0]}?" if close else "'powerband config show' lists them all."
