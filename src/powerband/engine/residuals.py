"""Compares measured steps with the latency model's predictions: an observer of the engine's loop."""

from __future__ import annotations

from powerband.core.loop import StepRecord
from powerband.cost.latency import LatencyModel

INTERVAL_STEPS = 8  # steps: a prediction takes some ten microseconds
_MAX_RATIOS = 4096  # kept until `take`


class Residuals:
    """Observed / predicted seconds of every eighth step that did not fail."""

    def __init__(self, model: LatencyModel) -> None:
        self._model = model
        self._ratios: list[float] = []

    def __call__(self, record: StepRecord) -> None:
        if record.step.index % INTERVAL_STEPS or record.result is None or len(self._ratios) >= _MAX_RATIOS:
            return
        works = [(work.num_tokens, work.start + work.num_tokens) for work in record.step.works]
        predicted_s = self._model.step_s(works, sum(work.samples for work in record.step.works))
        self._ratios.append(record.exclusive_s / predicted_s)

    def take(self) -> list[float]:
        """The ratios since the last call."""
        taken, self._ratios = self._ratios, []
        return taken
