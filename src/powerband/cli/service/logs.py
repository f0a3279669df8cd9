"""`powerband logs`: the logs of replicas, gateway and controller."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from powerband.cli.service.names import OldName
from powerband.errors import UsageError

_EVERY_S = 0.3


def logs(
    words: Annotated[
        tuple[str, ...],
        Parameter(
            name="[SERVICE] [PROCESS]",
            help="PROCESS: a replica, 'gateway' or 'controller'; default: all",
            negative="",
            show_default=False,
        ),
    ] = (),
    /,
    *,
    name: OldName = None,
    follow: Annotated[
        bool, Parameter(name=("--follow", "-f"), help="Keep printing new lines, until Ctrl-C", negative="")
    ] = False,
    lines: Annotated[int, Parameter(name=("--lines", "-n"), help="Number of lines from the end of each log")] = 20,
) -> int:
    """Print the end of logs, including those of removed replicas."""
    from powerband.fleet.service.logs import log_files, read_new
    from powerband.fleet.service.store import services, split_operands
    from powerband.fleet.targets.local import last_lines

    has_service = len(words) > 1 or any(store.name in words for store in services())
    folder, rest = split_operands(words, name, 0 if has_service and len(words) == 1 else 1)
    process = rest[0] if rest else None
    if not 0 <= lines <= 1_000_000:
        raise UsageError(f"lines is {lines}; it must be between 0 and 1000000.", param="lines")
    files = log_files(folder, process)
    reached = {path: path.stat().st_size for path in files}
    for path in files:
        _print(path, last_lines(path, lines) if lines else "", labelled=len(files) > 1)
    while follow:
        time.sleep(_EVERY_S)
        for path in log_files(folder, process):
            _print(path, read_new(path, reached), labelled=process is None)
    return 0


def _print(path: Path, text: str, *, labelled: bool) -> None:
    from powerband.fleet.targets.base import shown_name

    for line in text.splitlines():
        print(f"{shown_name(path.stem):<12} {line}" if labelled else line)
    sys.stdout.flush()
