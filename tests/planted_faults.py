"""Plants faults: replaces a method or function with a wrong one, so that a test can show that it would notice.

Usage, in a test module:

    FAULTS = Faults()

    @FAULTS.add("preemption keeps the epoch", Scheduler._preempt)
    def _(right, scheduler, r):
        epoch = r.epoch
        right(scheduler, r)
        r.epoch = epoch

    @pytest.mark.parametrize("fault", FAULTS, ids=str)
    def test_play_catches(fault):
        assert_caught(fault, play)

Nothing here depends on the text of the source: a fault refers to what it breaks by a Python name.
"""

from __future__ import annotations

import functools
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import pytest

MAX_CPU_S = 60


class NeverEnds(Exception):
    """The program uses processor time and gets nowhere."""


@dataclass(frozen=True)
class Fault:
    """`wrong(right, *arguments)` takes the place of `right`, a method, property or function."""

    name: str
    right: Any
    wrong: Callable[..., Any]

    def __str__(self) -> str:
        return self.name

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
        """Replace it. What is returned fills with errors of the fault itself: it has to be wrong, not broken."""
        right = self.right.fget if isinstance(self.right, property) else self.right
        broken: list[Exception] = []

        @functools.wraps(right)
        def planted(*args: Any, **kwargs: Any) -> Any:
            try:
                return self.wrong(right, *args, **kwargs)
            except (NameError, AttributeError, TypeError) as error:
                if traceback.extract_tb(error.__traceback__)[-1].filename in (
                    __file__,
                    self.wrong.__code__.co_filename,
                ):
                    broken.append(error)
                raise

        *classes, name = right.__qualname__.split(".")
        if classes:
            owner = functools.reduce(getattr, classes, sys.modules[right.__module__])
            monkeypatch.setattr(owner, name, property(planted) if isinstance(self.right, property) else planted)
        else:  # also where it was imported by name
            for module in [module for module in sys.modules.values() if vars(module).get(name) is right]:
                monkeypatch.setattr(module, name, planted)
        return broken


class Faults(list[Fault]):
    def add(self, name: str, right: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the decorated function as what takes the place of `right`."""
        assert name not in {fault.name for fault in self}, f"two faults are named {name!r}"

        def register(wrong: Callable[..., Any]) -> Callable[..., Any]:
            self.append(Fault(name, right, wrong))
            return wrong

        return register


def does_nothing(*_args: Any, **_kwargs: Any) -> None:
    """For a step that is left out."""


@contextmanager
def changed(thing: Any, **attributes: Any) -> Iterator[None]:
    """Give an object or a class other attributes or methods for a while."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in attributes.items():
            patch.setattr(thing, name, value)
        yield


def assert_caught(fault: Fault, play: Callable[[], object]) -> None:
    """Run `play` with the fault planted: it must fail, because of what the fault does and not because it cannot run."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise NeverEnds

    with pytest.MonkeyPatch.context() as patch:
        broken = fault.plant(patch)
        before = signal.signal(signal.SIGVTALRM, stop)
        signal.setitimer(signal.ITIMER_VIRTUAL, MAX_CPU_S)
        try:
            play()
        except Exception:
            is_caught = True
        else:
            is_caught = False
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
    assert not broken, f"the fault cannot run: {broken[0]!r}"
    assert is_caught, "nothing noticed the fault"
