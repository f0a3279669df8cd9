"""When a prompt's first token would come: what deadline admission asks (core.admission)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from powerband.spec.hardware.profile import HostModel


class StepTimeEstimator(Protocol):
    """A LatencyModel."""

    host: HostModel

    def step_s(self, works: Sequence[tuple[int, int]], sampled: int) -> float: ...


class FirstTokenEstimate:
    """Seconds, from prompt tokens that are computed before and those of the prompt, in steps of at most `budget`.

    share: of the estimate that counts; below 1 where it is uncertain, so that only hopeless requests are refused.
    Decodes that share the steps are left out, and so is what the prefix cache may hold.
    """

    def __init__(self, model: StepTimeEstimator, budget: int, *, share: float = 1.0) -> None:
        self._model, self._budget, self._share = model, budget, share
        self._full_s = model.step_s([(budget, budget)], 1) + model.host.step_s

    def __call__(self, tokens_ahead: int, prompt_tokens: int) -> float:
        seconds = 0.0
        if tokens_ahead:
            full, rest = divmod(tokens_ahead, self._budget)
            seconds += full * self._full_s
            # What is left of them shares the step with the prompt's beginning.
            first = min(prompt_tokens, self._budget - rest)
            works = [(count, count) for count in (rest, first) if count]
            seconds += self._step_s(works)
            done = first
        else:
            done = 0
        while done < prompt_tokens:
            new = min(prompt_tokens - done, self._budget)
            done += new
            seconds += self._step_s([(new, done)])
        return self._share * (seconds + self._model.host.answer_s)

    def _step_s(self, works: Sequence[tuple[int, int]]) -> float:
        host = self._model.host
        return self._model.step_s(works, 1) + host.step_s + host.per_request_s * len(works)
