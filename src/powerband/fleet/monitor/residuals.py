"""Change detection on latency: does the latency model still hold, and is a replica slower than the model or its peers?

A residual is ln(observed / predicted), which divides out the load, the main cause of latency. There are two sources, in
windows of ten seconds: steps, from the histogram of observed / predicted seconds that calibrated engines export; or the
time per output token of responses, which is compared with that of the other replicas alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median, median_low
from typing import Literal

from powerband.fleet.monitor.replica_metrics import ReplicaMetrics, median_ratio, steps_between

WINDOW_S = 10.0
SLACK = 0.10  # CUSUM's k: residuals up to this are ignored
THRESHOLD = 0.5  # CUSUM's h: steps that take twice as long reach it in two windows, 1.35 times in three
_MIN_STEPS = 5
_MIN_RESPONSES = 3
# Responses are noisier than steps: they are fewer, and each shares its batch with others.
_RESPONSE_SLACK, _RESPONSE_THRESHOLD = 0.18, 0.8
_MAX_AGE_S = 600.0  # a detection without new data is dropped after this


@dataclass(slots=True)
class Cusum:
    """Two-sided cumulative sum (Page 1954). It alarms above `threshold`, until two residuals in a row are within the
    slack again. size: mean of the residuals above the slack since the sum was last 0.
    """

    slack: float = SLACK
    threshold: float = THRESHOLD
    up: float = 0.0
    down: float = 0.0
    is_up: bool = False
    is_down: bool = False
    size: float = 0.0
    _num_above: int = 0
    _num_calm: int = 0

    def push(self, residual: float) -> None:
        max_sum = 2 * self.threshold
        if self.up == 0.0:
            self._num_above, self.size = 0, 0.0
        if residual > self.slack:
            self._num_above += 1
            self.size += (residual - self.size) / self._num_above
        self.up = min(max(self.up + residual - self.slack, 0.0), max_sum)
        self.down = min(max(self.down - residual - self.slack, 0.0), max_sum)
        self._num_calm = self._num_calm + 1 if abs(residual) <= self.slack else 0
        self.is_up = self.is_up or self.up > self.threshold
        self.is_down = self.is_down or self.down > self.threshold
        if self._num_calm >= 2 and (self.is_up or self.is_down):
            self.is_up = self.is_down = False
            self.up = self.down = 0.0


@dataclass(frozen=True, slots=True)
class SlowReplica:
    """A replica whose steps or responses take `ratio` times as long as the reference."""

    replica: str
    ratio: float
    reference: Literal["the model", "its peers"]


@dataclass(slots=True)
class StepResiduals:
    """The residuals of all replicas. slack: for the model; at least SLACK, because its predictions have a band."""

    slack: float = SLACK
    latest_ratio: dict[str, float] = field(default_factory=dict)  # by replica, of the last window with enough steps
    _before: dict[str, ReplicaMetrics] = field(default_factory=dict)
    _steps: dict[str, dict[float, float]] = field(default_factory=dict)
    _responses: dict[str, list[float]] = field(default_factory=dict)  # ln(seconds per output token)
    # By replica, with the time of the last residual: of steps and of responses, each relative to the peers.
    _step_cusums: dict[str, tuple[Cusum, float]] = field(default_factory=dict)
    _response_cusums: dict[str, tuple[Cusum, float]] = field(default_factory=dict)
    _model_cusum: Cusum = field(default_factory=Cusum)  # of all replicas together
    _model_s: float = 0.0
    _window_s: float | None = None

    def add_metrics(self, replica: str, metrics: ReplicaMetrics) -> None:
        before = self._before.get(replica)
        self._before[replica] = metrics
        if before is None:
            return
        steps = self._steps.setdefault(replica, {})
        for bound, count in steps_between(before, metrics).items():
            steps[bound] = steps.get(bound, 0.0) + count

    def add_response(self, replica: str, tpot_s: float) -> None:
        """Add a request that was answered by this replica alone."""
        if tpot_s > 0:
            self._responses.setdefault(replica, []).append(math.log(tpot_s))

    def update(self, now_s: float, present: Iterable[str]) -> None:
        """Evaluate the window if it is over. present: the existing replicas; data of others is dropped."""
        present = set(present)
        tables = (
            *(self._before, self._steps, self._responses),
            *(self._step_cusums, self._response_cusums, self.latest_ratio),
        )
        for table in tables:
            for replica in [replica for replica in table if replica not in present]:
                del table[replica]
        if self._window_s is None:
            self._window_s = now_s
        if now_s - self._window_s < WINDOW_S:
            return
        self._window_s = now_s
        self._evaluate_steps(now_s)
        self._evaluate_responses(now_s)
        self._steps, self._responses = {}, {}

    def slow_replicas(self, now_s: float) -> list[SlowReplica]:
        """Replicas that are slower than they should be, while the others are not."""
        found = {}
        for replica, (cusum, updated_s) in self._response_cusums.items():
            if cusum.is_up and now_s - updated_s < _MAX_AGE_S:
                found[replica] = SlowReplica(replica, math.exp(cusum.size), "its peers")
        for replica, (cusum, updated_s) in self._step_cusums.items():
            if cusum.is_up and now_s - updated_s < _MAX_AGE_S:
                found[replica] = SlowReplica(replica, math.exp(cusum.size), "the model")
        return list(found.values())

    def model_ratio(self, now_s: float) -> float | None:
        """observed / predicted seconds of steps, if all replicas have become slower than the model predicts."""
        is_slower = self._model_cusum.is_up and now_s - self._model_s < _MAX_AGE_S
        return math.exp(self._model_cusum.size) if is_slower else None

    def _evaluate_steps(self, now_s: float) -> None:
        residuals = {}
        for replica, steps in self._steps.items():
            ratio = median_ratio(steps)
            if ratio is not None and sum(steps.values()) >= _MIN_STEPS:
                residuals[replica] = math.log(ratio)
                self.latest_ratio[replica] = ratio
        if not residuals:
            return
        # The model is wrong only if the faster half of the replicas is slow, too.
        self._model_cusum.slack = max(self.slack, SLACK)
        self._model_cusum.push(median_low(residuals.values()))
        self._model_s = now_s
        for replica, residual in distance_from_peers(residuals).items():
            # A replica that is as fast as predicted is not slow, even if its peers are faster than predicted.
            cusum = self._step_cusums.setdefault(replica, (Cusum(), now_s))[0]
            cusum.push(min(residual, max(residuals[replica], 0.0)))
            self._step_cusums[replica] = cusum, now_s

    def _evaluate_responses(self, now_s: float) -> None:
        """Update the residuals from responses, for replicas without step residuals."""
        medians = {
            replica: median(values)
            for replica, values in self._responses.items()
            if len(values) >= _MIN_RESPONSES and replica not in self.latest_ratio
        }
        for replica, residual in distance_from_peers(medians).items():
            cusum = self._response_cusums.setdefault(replica, (Cusum(_RESPONSE_SLACK, _RESPONSE_THRESHOLD), now_s))[0]
            cusum.push(residual)
            self._response_cusums[replica] = cusum, now_s


def distance_from_peers(values: Mapping[str, float]) -> dict[str, float]:
    """The distance of each value from the median of the others; empty for a single one."""
    if len(values) < 2:
        return {}
    return {one: value - median(v for other, v in values.items() if other != one) for one, value in values.items()}
