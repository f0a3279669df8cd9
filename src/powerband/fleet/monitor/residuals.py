"""Is the latency model still right, and for which replica not? Sums of residuals, against the model and among peers.

A residual is ln(observed / predicted), so that load, which explains most of what latencies do, is divided out. Two
sources, in windows of ten seconds: steps, from the histogram that calibrated engines show (observed by predicted
seconds of a step), or else the time per output token of answers, which is predicted by the peers' only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median, median_low

from powerband.fleet.monitor.replica_metrics import ReplicaFigures, median_ratio, steps_between

WINDOW_S = 10.0
SLACK = 0.10  # of a residual that is no change: CUSUM's k
THRESHOLD = 0.5  # CUSUM's h: a step takes twice as long: two windows; 1.35 times: three
_FEWEST_STEPS = 5
_FEWEST_ANSWERS = 3
# Answers tell less than steps: they are fewer, and each has its own company in the batch.
_ANSWER_SLACK, _ANSWER_THRESHOLD = 0.18, 0.8
_UNSEEN_S = 600.0  # after which a finding without news is dropped


@dataclass(slots=True)
class Cusum:
    """Two-sided cumulative sum (Page 1954). It is set off above `threshold`; it is over when two residuals in a row
    are within the slack again. size: mean of the residuals above the slack since it last was at 0.
    """

    slack: float = SLACK
    threshold: float = THRESHOLD
    up: float = 0.0
    down: float = 0.0
    is_up: bool = False
    is_down: bool = False
    size: float = 0.0
    _count: int = 0
    _calm: int = 0

    def push(self, residual: float) -> None:
        most = 2 * self.threshold
        if self.up == 0.0:
            self._count, self.size = 0, 0.0
        if residual > self.slack:
            self._count += 1
            self.size += (residual - self.size) / self._count
        self.up = min(max(self.up + residual - self.slack, 0.0), most)
        self.down = min(max(self.down - residual - self.slack, 0.0), most)
        self._calm = self._calm + 1 if abs(residual) <= self.slack else 0
        self.is_up = self.is_up or self.up > self.threshold
        self.is_down = self.is_down or self.down > self.threshold
        if self._calm >= 2 and (self.is_up or self.is_down):
            self.is_up = self.is_down = False
            self.up = self.down = 0.0


@dataclass(frozen=True, slots=True)
class SlowReplica:
    """A replica whose steps or answers take `ratio` times as long as `beside` says: 'the model', 'its peers'."""

    replica: str
    ratio: float
    beside: str


@dataclass(slots=True)
class StepResiduals:
    """Of all replicas. slack: of the model, at least SLACK: its predictions' own band is no change."""

    slack: float = SLACK
    _before: dict[str, ReplicaFigures] = field(default_factory=dict)
    _steps: dict[str, dict[float, float]] = field(default_factory=dict)
    _answers: dict[str, list[float]] = field(default_factory=dict)  # ln of seconds per output token
    _own: dict[str, tuple[Cusum, float]] = field(default_factory=dict)  # beside peers, and when last fed
    _among: dict[str, tuple[Cusum, float]] = field(default_factory=dict)  # answers among peers
    _all: Cusum = field(default_factory=Cusum)
    _all_s: float = 0.0
    _window_s: float | None = None
    latest: dict[str, float] = field(default_factory=dict)  # ratio by replica, of the last window that told

    def see_metrics(self, replica: str, figures: ReplicaFigures) -> None:
        before = self._before.get(replica)
        self._before[replica] = figures
        if before is None:
            return
        into = self._steps.setdefault(replica, {})
        for bound, count in steps_between(before, figures).items():
            into[bound] = into.get(bound, 0.0) + count

    def see_answer(self, replica: str, tpot_s: float) -> None:
        """Of a request that only this replica answered."""
        if tpot_s > 0:
            self._answers.setdefault(replica, []).append(math.log(tpot_s))

    def look(self, now_s: float, present: Iterable[str]) -> None:
        """Judge, if a window is full. present: replicas that there are; what is known of others is dropped."""
        present = set(present)
        for known in (self._before, self._steps, self._answers, self._own, self._among, self.latest):
            for replica in [replica for replica in known if replica not in present]:
                del known[replica]
        if self._window_s is None:
            self._window_s = now_s
        if now_s - self._window_s < WINDOW_S:
            return
        self._window_s = now_s
        self._judge_steps(now_s)
        self._judge_answers(now_s)
        self._steps, self._answers = {}, {}

    def slow(self, now_s: float) -> list[SlowReplica]:
        """Replicas that are slower than they should be, and not all alike."""
        found = {}
        for kept, beside in ((self._among, "its peers"), (self._own, "the model")):
            for replica, (cusum, fed_s) in kept.items():
                if cusum.is_up and now_s - fed_s < _UNSEEN_S:
                    found[replica] = SlowReplica(replica, math.exp(cusum.size), beside)
        return list(found.values())

    def model(self, now_s: float) -> float | None:
        """How many times as long all replicas' steps take as predicted, when that is a change for the worse."""
        is_told = self._all.is_up and now_s - self._all_s < _UNSEEN_S
        return math.exp(self._all.size) if is_told else None

    def _judge_steps(self, now_s: float) -> None:
        residuals = {}
        for replica, steps in self._steps.items():
            ratio = median_ratio(steps)
            if ratio is not None and sum(steps.values()) >= _FEWEST_STEPS:
                residuals[replica] = math.log(ratio)
                self.latest[replica] = ratio
        if not residuals:
            return
        # All are off only when the less slow half is. A single replica has nobody to be told apart from.
        self._all.slack = max(self.slack, SLACK)
        self._all.push(median_low(residuals.values()))
        self._all_s = now_s
        for replica, residual in distance_from_peers(residuals).items():
            # Slower than peers that are faster than predicted is not slow.
            own = self._own.setdefault(replica, (Cusum(), now_s))[0]
            own.push(min(residual, max(residuals[replica], 0.0)))
            self._own[replica] = own, now_s

    def _judge_answers(self, now_s: float) -> None:
        """Only for replicas whose steps tell nothing."""
        told = {
            replica: median(values)
            for replica, values in self._answers.items()
            if len(values) >= _FEWEST_ANSWERS and replica not in self.latest
        }
        for replica, residual in distance_from_peers(told).items():
            among = self._among.setdefault(replica, (Cusum(_ANSWER_SLACK, _ANSWER_THRESHOLD), now_s))[0]
            among.push(residual)
            self._among[replica] = among, now_s


def distance_from_peers(values: Mapping[str, float]) -> dict[str, float]:
    """Each one's distance from the median of the others; nothing for one alone."""
    if len(values) < 2:
        return {}
    return {one: value - median(v for other, v in values.items() if other != one) for one, value in values.items()}
