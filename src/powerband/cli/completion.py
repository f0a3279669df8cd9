"""`powerband --install-completion`: the shell completes commands and options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from powerband.errors import EnvironmentFault, UsageError

Shell = Literal["bash", "zsh", "fish"]


def install_completion(
    *,
    shell: Annotated[
        Shell | None, Parameter(help="Default: the shell that this is typed in", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        Parameter(name=("--output", "-o"), help="Only write the script to this file", show_default=False),
    ] = None,
) -> int:
    """Install the completion of commands and options for bash, zsh or fish.

    Writes a script where the shell looks for it; for bash and zsh also a line into ~/.bashrc or ~/.zshrc.
    """
    from cyclopts.completion.detect import ShellDetectionError, detect_shell

    from powerband.cli.main import build_app

    if shell is None:
        try:
            detected = detect_shell()
        except ShellDetectionError:
            detected = "powershell"
        if detected == "powershell":
            raise UsageError("Cannot tell which shell this is.", hint="Add --shell bash, zsh or fish.", param="shell")
        shell = detected
    try:
        path = build_app().install_completion(shell=shell, output=output, add_to_startup=output is None)
    except OSError as problem:
        raise EnvironmentFault(f"Cannot write {problem.filename}: {problem.strerror}.", param="output") from None
    print(f"Completion for {shell} is in {path}. It works in new shells.")
    return 0
