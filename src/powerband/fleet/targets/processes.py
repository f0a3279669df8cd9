"""Processes of this machine as /proc tells of them: who is alive, who is who, what belongs together (Linux)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process, told from a later one with the same pid: started is in clock ticks since the boot, boot its id."""

    pid: int
    started: int
    boot: str


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """Of /proc/PID/stat: state is a letter, Z for a process that ended and was not yet asked for its exit code."""

    pid: int
    state: str
    session: int
    started: int
    resident_bytes: int


def boot_id() -> str:
    """Of this run of the machine; '' where the system does not tell."""
    with suppress(OSError):
        return (PROC / "sys/kernel/random/boot_id").read_text().strip()
    return ""


def stat_of(pid: int) -> ProcessStat | None:
    """None: there is no such process."""
    try:
        content = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The command's name stands in brackets and may hold anything, brackets and blanks too.
    fields = content[content.rindex(")") + 2 :].split()
    return ProcessStat(pid, fields[0], int(fields[3]), int(fields[19]), int(fields[21]) * _PAGE)


def identify(pid: int) -> ProcessId | None:
    found = stat_of(pid)
    return None if found is None else ProcessId(pid, found.started, boot_id())


def is_alive(who: ProcessId) -> bool:
    """Whether this very process runs; one that ended but was not reaped does not."""
    found = stat_of(who.pid)
    return found is not None and found.started == who.started and found.state not in "ZX" and who.boot == boot_id()


@dataclass(frozen=True, slots=True)
class EnvironmentTag:
    """A variable in the environment of processes that belong together; children inherit it."""

    name: str
    value: str

    def is_on(self, pid: int) -> bool:
        with suppress(OSError):
            return f"{self.name}={self.value}".encode() in (PROC / str(pid) / "environ").read_bytes().split(b"\0")
        return False


def session_members(session: int, mark: EnvironmentTag) -> list[ProcessStat]:
    """All living processes of a session that carry the mark: a server, its engine, and what they started. Whoever got
    the session's number later, when it was free again, does not.
    """
    return [stat for stat in _all() if stat.session == session and stat.state not in "ZX" and mark.is_on(stat.pid)]


def signal_session(session: int, mark: EnvironmentTag, number: signal.Signals) -> None:
    """To every process of it. A server's death leaves its engine, which must go, too."""
    for stat in session_members(session, mark):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(stat.pid, number)


def session_leader_with(mark: EnvironmentTag) -> ProcessId | None:
    """The session leader that carries the mark: finds a process whose pid nobody could write down in time."""
    for stat in _all():
        if stat.session == stat.pid and stat.state not in "ZX" and mark.is_on(stat.pid):
            return ProcessId(stat.pid, stat.started, boot_id())
    return None


def memory_available_bytes() -> int:
    """That can be taken without swapping, within this container's limit."""
    available = _meminfo("MemAvailable")
    with suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        return min(available, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return available


def _meminfo(name: str) -> int:
    for line in (PROC / "meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _all() -> Iterator[ProcessStat]:
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            found = stat_of(int(entry.name))
            if found is not None:
                yield found
