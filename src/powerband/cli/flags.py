"""Turns settings classes into the flags of a command, so that each flag is written down once: in the settings class."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from cyclopts import Group, Parameter

from powerband.engine.this_machine import compute_device
from powerband.gateway.settings import GatewaySettings
from powerband.server.ineffective_options import check_effects
from powerband.server.settings import ServerSettings
from powerband.spec.settings import EngineSettings, value_types
from powerband.spec.settings_layers import resolve

ALL_SETTINGS: tuple[type, ...] = (EngineSettings, ServerSettings)
KNOWN_SETTINGS = (*ALL_SETTINGS, GatewaySettings)  # one file and one environment may hold those of all commands
GROUPS = ("Model", "Adapters", "Device", "Memory", "Scheduling", "Server", "Gateway", "Queue", "Failure")
CONFIG_HELP = "Settings file in YAML, one 'name: value' per line; flags and POWERBAND_* variables win over it"
Json = Annotated[bool, Parameter(help="Print the result as JSON", negative="")]
MODEL_HELP = "Folder, Hugging Face id, or 'demo' for the model in the package"


def takes_settings(*classes: type, without: tuple[str, ...] = ()) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command --config and a flag per setting, and MODEL if there is an engine; its first argument receives them
    merged, as `Resolved`.

    without: settings that mean nothing to this command. They get no flag here, but may stand in a shared file.
    """
    has_model = EngineSettings in classes

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        flags = _flags(classes, without={*without, "model"})

        def run(model: str | None = None, /, *, config: Path | None = None, **options: Any) -> int:
            given = {flag.name: options.pop(flag.name) for flag in flags if flag.name in options}
            given = {name: value for name, value in given.items() if value is not None}
            if model is not None:
                given["model"] = model
            settings = resolve(classes, KNOWN_SETTINGS, given, os.environ, config)
            if has_model:
                check_effects(settings, lambda: compute_device(settings.engine))
            return command(settings, **options)

        parameters = [*([_model_parameter()] if has_model else ()), *own, _config_parameter(), *flags]
        run.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]  # cyclopts reads it
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__doc__, run.__name__ = command.__doc__, command.__name__
        return run

    return decorate


def add_flags(options: type, group: Group) -> None:
    """Make the fields of a dataclass that have a help text flags of every command that takes the class."""
    hints = get_type_hints(options)
    for item in fields(options):
        if "help" in item.metadata:
            flag = Parameter(
                name=item.metadata["names"] or None,
                help=item.metadata["help"],
                group=group,
                negative="",
                show_default=False,
            )
            item.type = options.__annotations__[item.name] = Annotated[hints[item.name], flag]
    Parameter(name="*")(options)


def _flags(classes: tuple[type, ...], without: set[str]) -> list[inspect.Parameter]:
    """A flag for each setting, and one that help does not show for each name of the version before."""
    settings = [(item, value_types(kind)[item.name]) for kind in classes for item in fields(kind)]
    settings = [(item, declared) for item, declared in settings if item.name not in without]
    renamed = [(item, declared) for item, declared in settings if "was" in item.metadata]
    flags = [_flag(item.name, item, declared) for item, declared in settings]
    return [*flags, *(_flag(item.metadata["was"], item, declared, show=False) for item, declared in renamed)]


def _flag(name: str, item: Field[Any], declared: Any, *, show: bool = True) -> inspect.Parameter:
    # The default is None, so that a flag that was given differs from one that was not; help shows the real one.
    shown = Parameter(
        show=show,
        help=item.metadata["help"],
        group=Group(item.metadata["group"], sort_key=GROUPS.index(item.metadata["group"])),
        show_default=(lambda _: item.default) if item.default is not None and item.default is not False else False,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[declared | None, shown]
    )


def _model_parameter() -> inspect.Parameter:
    annotation = Annotated[str | None, Parameter(help=MODEL_HELP)]
    return inspect.Parameter("model", inspect.Parameter.POSITIONAL_ONLY, default=None, annotation=annotation)


def _config_parameter() -> inspect.Parameter:
    annotation = Annotated[Path | None, Parameter(help=CONFIG_HELP)]
    return inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
