"""Names in users' files and commands that have changed: the old one works for one release, with a warning."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

_LOG = logging.getLogger("powerband")


@functools.cache
def warn_renamed(old: str, new: str) -> None:
    """Once per name and process, on stderr unless logging is configured otherwise."""
    _LOG.warning("%s is now called %s. The old name works in this release only.", old, new)


@functools.cache
def new_names(kind: Any) -> Mapping[str, str]:
    """Old name → name of the fields of a dataclass, whose metadata holds the old one: {"was": "max_tries"}."""
    return {item.metadata["was"]: item.name for item in fields(kind) if "was" in item.metadata}


def option(name: str) -> str:
    """max_attempts → --max-attempts"""
    return "--" + name.replace("_", "-")


def rename_options(arguments: Sequence[str], names: Mapping[str, str]) -> tuple[str, ...]:
    """Arguments of a command, with other names for some options. names: {"max_tries": "max_attempts"}."""
    options = {option(old): option(new) for old, new in names.items()}
    split = (argument.partition("=") for argument in arguments)
    return tuple(options.get(name, name) + sign + value for name, sign, value in split)
