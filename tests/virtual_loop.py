"""An event loop in virtual time: its clock jumps to the next timer."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Never waits: when nothing is ready, its time jumps to the next timer."""

    def __init__(self, now_s: float = 1000.0) -> None:
        super().__init__(_NoWait(self))
        self.now_s = now_s

    def time(self) -> float:
        return self.now_s


class _NoWait(selectors.DefaultSelector):  # type: ignore[misc, valid-type]  # the class differs by platform
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout:
            self._loop.now_s += timeout
        return super().select(0)


def virtually(test: Callable[[VirtualLoop], Awaitable[T]], *, within_s: float = 3600.0, start_s: float = 1000.0) -> T:
    """Run a test in virtual time; it must end within so many virtual seconds."""
    loop = VirtualLoop(start_s)
    try:
        return loop.run_until_complete(asyncio.wait_for(test(loop), within_s))
    finally:
        loop.close()
