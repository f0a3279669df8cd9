"""Waking up on time: an event loop's own timers are up to a millisecond late, which is more than we want to measure.

One timerfd (Linux) wakes the loop at the earliest of all times that were asked for, to within tens of microseconds and
without a busy wait. Elsewhere the loop's timer is used, and the last stretch is waited for in short turns.
"""

from __future__ import annotations

import asyncio
import ctypes
import heapq
import os
import sys
import time
from collections.abc import Callable
from itertools import count

_COARSE_S = 0.0015
_ABSOLUTE, _FLAGS = 1, os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)


class PreciseTimer:
    """Calls back at times of the system's monotonic clock. Belongs to the running event loop until `close`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        self._order = count()
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._fd = -1 if libc is None else libc.timerfd_create(time.CLOCK_MONOTONIC, _FLAGS)
        self._set = None if libc is None else libc.timerfd_settime
        self._setting = (ctypes.c_int64 * 4)()  # interval and time: seconds and nanoseconds of each
        self._timer: asyncio.TimerHandle | None = None
        self._is_open, self._is_ringing = True, False
        if self._fd >= 0:
            self._loop.add_reader(self._fd, self._ring)

    def at(self, due_s: float, callback: Callable[[], object]) -> None:
        """Soon, if that time has passed; calls for the same time in the order in which they were asked for."""
        heapq.heappush(self._due, (due_s, next(self._order), callback))
        if not self._is_ringing and self._due[0][0] == due_s:
            self._arm(due_s)

    async def until(self, due_s: float) -> None:
        """Returns at once when that time has passed."""
        if time.monotonic() >= due_s:
            return
        reached: asyncio.Future[None] = self._loop.create_future()

        def reach() -> None:
            if not reached.done():
                reached.set_result(None)

        self.at(due_s, reach)
        await reached

    def postpone(self, seconds: float) -> None:
        """Everything that is still to come."""
        self._due = [(due_s + seconds, order, callback) for due_s, order, callback in self._due]
        if self._due and not self._is_ringing:
            self._arm(self._due[0][0])

    def close(self) -> None:
        """Nothing is called any more."""
        self._is_open = False
        self._due.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _ring(self) -> None:
        now_s, self._is_ringing = time.monotonic(), True
        try:
            while self._due and self._due[0][0] <= now_s:
                heapq.heappop(self._due)[2]()
        finally:
            self._is_ringing = False
            if self._is_open:
                self._arm(self._due[0][0] if self._due else 0.0)

    def _arm(self, due_s: float) -> None:
        """For that time; 0: for none. This, too, is what makes the timer unreadable again."""
        if self._fd >= 0 and self._set is not None:
            seconds = int(due_s)
            self._setting[2], self._setting[3] = seconds, int((due_s - seconds) * 1e9)
            self._set(self._fd, _ABSOLUTE, self._setting, None)
            return
        if self._timer is not None:
            self._timer.cancel()
        if not due_s:
            return
        self._timer = self._loop.call_later(max(due_s - time.monotonic() - _COARSE_S, 0.0), self._ring)
