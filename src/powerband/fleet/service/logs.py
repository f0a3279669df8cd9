"""The log files of a service's processes."""

from __future__ import annotations

from pathlib import Path

from powerband.errors import UsageError
from powerband.fleet.service.store import ServiceStore


def log_files(folder: ServiceStore, process: str | None) -> list[Path]:
    """Raises UsageError, with the known names, for an unknown one."""
    found = sorted(folder.logs.glob("*.log"), key=lambda path: path.stat().st_mtime)
    if process is None:
        status = folder.read_status()
        alive = {"controller", *(one.id for one in status.replicas)} if status is not None else set()
        return [path for path in found if path.stem in alive or path.stem.startswith("gateway-")]
    chosen = [path for path in found if path.stem == process]
    if process == "gateway":  # every start of it has a log of its own
        chosen = [path for path in found if path.stem.startswith("gateway-")][-1:]
    if not chosen:
        known = ", ".join(path.stem for path in found) or "none"
        raise UsageError(f"There is no log of {process!r}.", hint=f"There are: {known}.", param="process")
    return chosen


def read_new(path: Path, reached: dict[Path, int]) -> str:
    """What was written since the last look, in whole lines."""
    with path.open("rb") as file:
        file.seek(reached.get(path, 0))
        content = file.read()
    end = content.rfind(b"\n") + 1
    reached[path] = reached.get(path, 0) + end
    return content[:end].decode(errors="replace").rstrip("\n")
