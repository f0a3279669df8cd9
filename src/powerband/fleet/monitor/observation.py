"""What the watcher is shown about once a second: what ended, what the gateway and the replicas say, how the host is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from powerband.gateway.request import Finished
from powerband.gateway.snapshot import PoolSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLoad:
    """cpu_waiting, memory_stalled: share of the last 10 s in which some task waited for a processor; in which all
    waited for memory (Linux' pressure stall information); None: not told. Memory in bytes.
    """

    load: float
    cores: int
    cpu_waiting: float | None = None
    memory_stalled: float | None = None
    memory_bytes: int = 0
    memory_available_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """now_s: time.time(); clock_s: time.monotonic(), by which windows go. finished: since the observation before.
    pools: None: the gateway does not answer.

    metrics: what replicas' /metrics answered, by id; who did not answer in time is not there.
    """

    now_s: float
    clock_s: float
    finished: tuple[Finished, ...] = ()
    pools: tuple[PoolSnapshot, ...] | None = ()
    metrics: Mapping[str, str] = field(default_factory=dict)
    host: HostLoad | None = None


def read_host(proc: Path = Path("/proc")) -> HostLoad | None:
    """None where the system tells nothing of the kind."""
    try:
        load = float((proc / "loadavg").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    memory = _memory(proc / "meminfo")
    return HostLoad(
        load=load,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cpu_waiting=_pressure(proc / "pressure" / "cpu", "some"),
        memory_stalled=_pressure(proc / "pressure" / "memory", "full"),
        memory_bytes=memory.get("MemTotal", 0),
        memory_available_bytes=memory.get("MemAvailable", 0),
    )


def _pressure(path: Path, kind: str) -> float | None:
    """Lines like 'some avg10=1.23 avg60=…', in percent."""
    try:
        for line in path.read_text().splitlines():
            words = line.split()
            if words and words[0] == kind:
                return float(dict(word.split("=", 1) for word in words[1:])["avg10"]) / 100
    except (OSError, ValueError, KeyError):
        pass
    return None


def _memory(path: Path) -> dict[str, int]:
    """Lines like 'MemTotal:  16384 kB'."""
    found = {}
    try:
        for line in path.read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("MemTotal", "MemAvailable"):
                found[name] = int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return {}
    return found
