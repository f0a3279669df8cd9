"""The commands of README.md and docs/*.md: what stands in a fenced block without a language, or with that of a shell.

A comment in the line above a block says what a reader has done before, or why the tests leave the block out:

    <!-- tests first run: powerband serve demo -->
    <!-- tests leave out: needs a GPU -->

and above a block in another language, under which name the reader has saved it:

    <!-- tests write: plan.yaml -->
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = ("powerband", "curl", "echo")  # programs that the tests run; blocks of others say why they are left out
_OTHERS = (
    "apt",
    "cd",
    "docker",
    "git",
    "helm",
    "hf",
    "kubectl",
    "make",
    "pip",
    "python",
    "python3",
    "sudo",
    "systemctl",
)
_SHELLS = ("", "sh", "bash", "console", "shell")
_BLOCK = re.compile(
    r"(?:^<!-- tests (first run|leave out|write): ([^\n]*?) -->\n+)?^( *)```([\w.-]*)[^\n]*\n(.*?)^ *```", re.M | re.S
)
_VARIABLE = re.compile(r"[A-Z_]+=")


@dataclass(frozen=True)
class SavedFile:
    """A fenced block that the reader has saved."""

    name: str
    content: str


@dataclass(frozen=True)
class Block:
    """A fenced block of commands. line: of its first command."""

    page: Path
    line: int
    commands: tuple[str, ...]
    first: str = ""
    left_out: str = ""  # why


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        how, what, indent, language, body = match.groups()
        body = "".join(line.removeprefix(indent) for line in body.splitlines(keepends=True))
        if language not in _SHELLS or program(body) not in (*RUN, *_OTHERS):
            continue
        line = text.count("\n", 0, match.start(5)) + 1
        first, left_out = (what if how == name else "" for name in ("first run", "leave out"))
        found.append(Block(page, line, tuple(commands(body)), first, left_out))
    return found


def saved_files(page: Path) -> list[SavedFile]:
    found = _BLOCK.findall(page.read_text())
    return [SavedFile(what, body) for how, what, _, _, body in found if how == "write"]


def commands(body: str) -> list[str]:
    """Lines that belong together are one command: after a backslash, and within quotes."""
    found, pending = [], ""
    for line in body.splitlines():
        pending = f"{pending}\n{line}" if pending else line
        if not pending.strip() or pending.lstrip().startswith("#"):
            pending = ""
        elif not pending.endswith("\\") and _is_whole(pending):
            found.append(pending)
            pending = ""
    return [*found, *([pending] if pending else [])]


def program(command: str) -> str:
    """'powerband' of 'KEY=$(powerband keys create app)' and of '.venv/bin/powerband serve'."""
    words = command.split()
    while words and _VARIABLE.match(words[0]):
        _, inside, first = words[0].partition("=$(")
        words = [first, *words[1:]] if inside else words[1:]
    return words[0].rpartition("/")[2] if words else ""


def powerband_lines(command: str) -> list[list[str]]:
    """The arguments of each call of powerband in a command, as it stands there."""
    text = command.replace("\\\n", " ")
    inner = re.findall(r"\$\((powerband [^)]*)\)", text)
    parts = inner or re.split(r"\s\|\s", text)
    lines = [shlex.split(part, comments=True) for part in parts]
    return [line[1:] for line in lines if line and line[0].rpartition("/")[2] == "powerband"]


def _is_whole(text: str) -> bool:
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return False
    return True
