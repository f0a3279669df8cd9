"""Time, as the core sees it: passed in, never asked for elsewhere."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A clock that never goes back, in seconds from an arbitrary start."""

    def now(self) -> float: ...

    def wait_until(self, t: float) -> None:
        """Return when `now()` is at least `t`."""
        ...


class MonotonicClock:
    """This machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()

    def wait_until(self, t: float) -> None:
        while (left := t - time.monotonic()) > 0:
            time.sleep(left)


class VirtualClock:
    """A clock that moves only when something waits, and then at once."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def wait_until(self, t: float) -> None:
        self._now = max(self._now, t)
