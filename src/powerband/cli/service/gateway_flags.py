"""Settings of a service's gateway, checked before anything starts."""

from __future__ import annotations

import shlex

from powerband.errors import UsageError
from powerband.renamed import new_names, rename_options

_DEPLOYED = ("host", "port", "auth", "database", "routes", "replica", "config")


def gateway_arguments(text: str) -> tuple[str, ...]:
    """Options of 'powerband gateway', by their names of this version. Raises UsageError for an invalid one."""
    from cyclopts import CycloptsError

    from powerband.cli.flags import KNOWN_SETTINGS
    from powerband.cli.main import build_app
    from powerband.gateway.settings import GatewaySettings
    from powerband.spec.settings_layers import resolve

    arguments = tuple(shlex.split(text))
    try:
        _, bound, _ = build_app("gateway").parse_args(["gateway", *arguments], exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise UsageError(
            f"gateway-args: {error}", hint="'powerband gateway --help' lists the options.", param="gateway_args"
        ) from None
    given = {name: value for name, value in bound.kwargs.items() if value is not None}
    decided = [name for name in given if name in _DEPLOYED]
    if decided:
        raise UsageError(f"gateway-args: {decided[0]} is set by deploy.", param="gateway_args")
    resolve((GatewaySettings,), KNOWN_SETTINGS, given, {}, None)
    return rename_options(arguments, new_names(GatewaySettings))
