"""How much of the machine's CPU time other processes take. Standard library only: peers' environments import it."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIMIT = 0.05  # of the machine's CPU time: figures taken beside more are measured again
WAIT_S = 300.0  # for a quiet moment; after that the run goes ahead, and its share says what it is worth
ATTEMPTS = 3


def machine_busy_s() -> float:
    """CPU seconds that this machine has spent, those that the hypervisor took included (Linux; elsewhere 0)."""
    try:
        fields = [int(item) for item in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except (OSError, ValueError):
        return 0.0
    return (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def own_s(children: list[int]) -> float:
    """CPU seconds of this process, of the children it has waited for, and of those in `children` that still run."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + sum(_tree_s(pid) for pid in children)


def _tree_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        below = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (OSError, ValueError):
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") + sum(_tree_s(child) for child in below)


@dataclass
class Guard:
    """Measures only while the machine is quiet. `others`: the share that others took, by row."""

    enabled: bool = True
    others: dict[str, float] = field(default_factory=dict)
    children: list[int] = field(default_factory=list)  # processes that belong to the measurement

    def __call__(self, row: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The metrics of one row, measured again when others took too much, at most ATTEMPTS times; the quietest."""
        attempts: list[tuple[float, dict[str, float]]] = []
        for _ in range(ATTEMPTS if self.enabled else 1):
            if self.enabled:
                self._wait()
            share, metrics = self._share(measure)
            attempts.append((share, metrics))
            if share <= LIMIT:
                break
        share, metrics = min(attempts, key=lambda attempt: attempt[0])
        self.others[row] = share
        return metrics

    def _wait(self) -> None:
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline and self._share(lambda: time.sleep(1.0))[0] > LIMIT:
            pass

    def _share(self, function: Callable[[], Any]) -> tuple[float, Any]:
        start, busy, own = time.monotonic(), machine_busy_s(), own_s(self.children)
        value = function()
        elapsed = max(time.monotonic() - start, 1e-9)
        others = machine_busy_s() - busy - (own_s(self.children) - own)
        return max(others, 0.0) / elapsed / (os.cpu_count() or 1), value
