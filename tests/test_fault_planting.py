"""A planted fault that cannot run proves nothing, and must not pass for one that was noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import planted_faults
from planted_faults import Fault, NeverEnds, assert_caught


class Counter:
    count = 0

    def add(self, number: int) -> None:
        self.count += number


def count_to_three() -> None:
    counter = Counter()
    counter.add(3)
    assert counter.count == 3


def test_a_fault_is_planted_only_while_its_effect_is_looked_for() -> None:
    assert_caught(
        Fault("adds one more", Counter.add, lambda right, self, number: right(self, number + 1)), count_to_three
    )
    count_to_three()


def test_a_fault_without_effect_is_reported() -> None:
    with pytest.raises(AssertionError, match="nothing noticed the fault"):
        assert_caught(Fault("none", Counter.add, lambda right, *args: right(*args)), count_to_three)


@pytest.mark.parametrize("wrong", [lambda right, self: None, lambda right, self, number: self.total])
def test_a_fault_that_cannot_run_is_reported(wrong: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError, match="the fault cannot run"):
        assert_caught(Fault("a method with other arguments, or an unknown name", Counter.add, wrong), count_to_three)


def test_a_program_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted_faults, "MAX_CPU_S", 0.05)
    stopped = []

    def wait_for_three() -> None:
        counter = Counter()
        try:
            while counter.count < 3:
                counter.add(1)
        except NeverEnds:
            stopped.append(True)
            raise

    assert_caught(Fault("adds nothing", Counter.add, planted_faults.does_nothing), wait_for_three)
    assert stopped
