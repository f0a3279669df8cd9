"""The pages whose commands are typed, and on which machines: a fresh one, and one that was calibrated."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from markdown_commands import PAGES, blocks

RUNNER = Path(__file__).with_name("run_page.py")
LIMIT_S = 900  # of a page, on a machine that is busy


def _has(page: Path, command: str) -> bool:
    return any(re.match(command, typed) for block in blocks(page) if not block.left_out for typed in block.commands)


def _num_commands(page: Path) -> int:
    """That are typed."""
    return sum(len(block.commands) for block in blocks(page) if not block.left_out)


def cases() -> list[ParameterSet]:
    """Of each page: all commands on the machine that its reader has, and those that plan for it on the other one, too.

    Plans for other devices do not depend on it. Pages with many commands come first.
    """
    fresh: tuple[str, list[str]] = ("fresh", [])
    calibrated = ("calibrated", ["--calibrated"])
    found = []
    for page in sorted(filter(_num_commands, PAGES), key=_num_commands, reverse=True):
        readers, other = (fresh, calibrated) if _has(page, r"powerband calibrate\b") else (calibrated, fresh)
        found.append(pytest.param(page, readers[1], id=f"{page.name}-{readers[0]}"))
        if _has(page, r"powerband plan\b(?!.*--devices)"):
            found.append(pytest.param(page, [*other[1], "--only-plans"], id=f"{page.name}-{other[0]}-plans"))
    return found


def type_page(page: Path, options: list[str], network: list[str], folder: Path) -> None:
    """Fails with what the runner printed: each command, and of one that failed the exit code and the output's end."""
    command = [*network, sys.executable, str(RUNNER), str(page), str(folder / "machine"), *options]
    printed = folder / "printed.txt"
    with printed.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            code: int | str = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            code = f"did not end within {LIMIT_S} s"
        finally:
            process.terminate()  # it ends all that it has started
            process.wait(60)
    print(printed.read_text())
    assert code == 0, f"{code}\n{printed.read_text()}"
