"""Processes of this machine: identified although the system reuses pids, and grouped by a tag in their environment."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
# psutil derives start times from the wall clock, whose rounding can change by a second while a process runs.
_START_TOLERANCE = 2 * _CLOCK_TICKS
_EXITED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process, distinguished from a later one with the same pid."""

    pid: int
    started: int  # clock ticks from the boot to its start
    boot: str  # id of the boot; '' where the system has none


@dataclass(frozen=True, slots=True)
class EnvironmentTag:
    """A variable in the environment of processes that belong together; child processes inherit it."""

    name: str
    value: str

    def is_on(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error, OSError):
            return bool(process.environ().get(self.name) == self.value)
        return False


def identify(pid: int) -> ProcessId | None:
    """None: there is no such process."""
    try:
        started_s = psutil.Process(pid).create_time() - psutil.boot_time()
    except psutil.Error:
        return None
    return ProcessId(pid, round(started_s * _CLOCK_TICKS), _boot_id())


def is_alive(expected: ProcessId) -> bool:
    """Whether exactly this process runs. False for a zombie."""
    found = identify(expected.pid)
    if found is None or found.boot != expected.boot or abs(found.started - expected.started) > _START_TOLERANCE:
        return False
    return _running(expected.pid) is not None


def session_processes(session: int, tag: EnvironmentTag) -> list[psutil.Process]:
    """The running processes of a session that carry the tag: a server, its engine and their children, but not the
    processes of a later session that got the same number.
    """
    found = (_running(pid) for pid in psutil.pids() if _session(pid) == session)
    return [process for process in found if process is not None and tag.is_on(process)]


def signal_session(session: int, tag: EnvironmentTag, number: signal.Signals) -> None:
    """Send a signal to every process of the session, because an engine may outlive its server."""
    for process in session_processes(session, tag):
        with suppress(psutil.Error):
            process.send_signal(number)


def session_leader_with(tag: EnvironmentTag) -> ProcessId | None:
    """The session leader with this tag: finds a process whose starter crashed before it could record the pid."""
    for pid in psutil.pids():
        if _session(pid) == pid and (process := _running(pid)) is not None and tag.is_on(process):
            return identify(pid)
    return None


def resident_bytes(process: psutil.Process) -> int:
    """0 when the process has exited."""
    with suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def oom_kills(root: Path = Path("/")) -> int:
    """How many processes the kernel has killed since the boot because memory ran out: of this process's container, and
    of the machine. 0 where the system does not say.
    """
    group = ""
    with suppress(OSError, IndexError):
        group = (root / "proc/self/cgroup").read_text().partition("0::")[2].splitlines()[0].lstrip("/")
    files = (root / "sys/fs/cgroup" / group / "memory.events", root / "proc/vmstat")
    return sum(_count_of("oom_kill", path) for path in files)


def was_rebooted_since(process: ProcessId) -> bool:
    return process.boot != _boot_id()


def _count_of(name: str, path: Path) -> int:
    """From lines of 'name count'. 0: there is none."""
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0


def _running(pid: int) -> psutil.Process | None:
    """None: there is no such process, or only a zombie."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return process if process.status() not in _EXITED else None
    return None


def _session(pid: int) -> int | None:
    """None: the process has exited."""
    with suppress(OSError):
        return os.getsid(pid)
    return None


def _boot_id() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
