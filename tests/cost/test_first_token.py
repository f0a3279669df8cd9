"""When a first token would come, by what is known of steps."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from powerband.cost.first_token import FirstTokenEstimate
from powerband.spec.hardware.profile import Evidence, HostModel

HOST = HostModel(
    step_s=0.5, per_request_s=0.0, arrival_s=9.0, answer_s=0.25, evidence=Evidence(source="test", error=0.0)
)


class OneSecondAToken:
    host = HOST

    def step_s(self, works: Sequence[tuple[int, int]], sampled: int) -> float:
        return float(sum(new for new, _ in works))


@pytest.mark.parametrize(
    ("ahead", "prompt", "steps"), [(0, 10, 1), (0, 100, 1), (0, 101, 2), (90, 10, 1), (90, 11, 2), (250, 50, 3)]
)
def test_all_tokens_are_computed_in_steps_of_the_budget(ahead: int, prompt: int, steps: int) -> None:
    estimate = FirstTokenEstimate(OneSecondAToken(), 100)
    assert estimate(ahead, prompt) == pytest.approx(ahead + prompt + 0.5 * steps + 0.25)


def test_what_is_uncertain_counts_in_part() -> None:
    assert FirstTokenEstimate(OneSecondAToken(), 100, share=0.6)(0, 10) == pytest.approx(0.6 * 10.75)
