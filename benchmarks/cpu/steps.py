"""Steps that take minutes, are done once, and go on where they stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


class StepFailed(RuntimeError):
    """A step's command failed. The message has the end of its output."""


class Steps:
    """Runs commands with their output in a log file, showing one line for each step."""

    def __init__(self, home: Path) -> None:
        self.home = home
        (home / "logs").mkdir(parents=True, exist_ok=True)
        (home / "done").mkdir(exist_ok=True)

    def once(self, name: str, *commands: Sequence[str], environment: dict[str, str] | None = None) -> None:
        """Run `commands` unless they have succeeded before. Raises StepFailed."""
        text = "\n".join(" ".join(command) for command in commands)
        mark, log = self.home / "done" / name.replace(" ", "-"), self.home / "logs" / (name.replace(" ", "-") + ".log")
        if mark.is_file() and mark.read_text() == text:
            return
        print(f"· {name} …", end="", flush=True)
        start = time.monotonic()
        with log.open("w") as output:
            for command in commands:
                env = os.environ | {"PYTHONPATH": ""} | (environment or {})
                done = subprocess.run(
                    command, stdout=output, stderr=subprocess.STDOUT, env=env, stdin=subprocess.DEVNULL
                )
                if done.returncode:
                    print(" failed")
                    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                    raise StepFailed(f"{name}: {' '.join(command)} ended with {done.returncode}; see {log}\n{tail}")
        mark.write_text(text)
        print(f" {time.monotonic() - start:.0f} s")

    def venv(self, folder: Path) -> list[str]:
        """The command that makes it, which does no harm where it exists."""
        return [sys.executable, "-m", "venv", str(folder)]
