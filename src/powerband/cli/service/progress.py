"""Progress of a change: one line on stderr for each thing that changes, and one from time to time while none does."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

from powerband.fleet.report.status_table import activity
from powerband.fleet.service.status import ServiceStatus

REMIND_AFTER_S = 10.0


@dataclass(slots=True)
class ServiceProgress:
    """Lines with the seconds since the start."""

    quiet: bool = False
    began_s: float = field(default_factory=time.monotonic)
    _last: dict[str, str] = field(default_factory=dict)
    _described_s: float = field(default_factory=time.monotonic)

    def __call__(self, status: ServiceStatus) -> None:
        current: dict[str, str] = {"gateway": status.gateway.state}
        current |= {one.id: activity(one) for one in status.replicas}
        for id in self._last.keys() - current.keys():
            self.describe(f"{id}: gone")
        for id, text in current.items():
            if self._last.get(id) != text:
                self.describe(f"{id}: {text}")
        self._last = current
        if time.monotonic() - self._described_s >= REMIND_AFTER_S:
            waiting = [f"{id}: still {text}" for id, text in current.items() if text != "ready"]
            self.describe(", ".join(waiting) or "still waiting")

    def describe(self, text: str) -> None:
        self._described_s = time.monotonic()
        if not self.quiet:
            print(f"· {time.monotonic() - self.began_s:5.1f} s  {text}", file=sys.stderr, flush=True)
