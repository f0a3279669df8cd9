"""The metrics of a replica that the monitor uses, for any engine. Parsing must be fast: it runs once a second."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from powerband.engines.metrics import known_metrics
from powerband.metrics.exposition import label, samples
from powerband.metrics.prometheus import RATIO_BUCKETS

_RESIDUALS = b"powerband_step_residual_ratio_bucket"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaMetrics:
    values: Mapping[str, float] = field(default_factory=dict)  # by the names of engines.base.Metric; any may be missing
    # Cumulative number of steps by upper bound of observed / predicted seconds; empty: the engine is not calibrated.
    step_residuals: Mapping[float, float] = field(default_factory=dict)

    @property
    def processed_tokens(self) -> float | None:
        """Prompt and output tokens since the replica's start: they grow while it makes progress."""
        counts = [self.values[name] for name in ("prompt_tokens", "output_tokens") if name in self.values]
        return sum(counts) if counts else None


def read_metrics(text: str) -> ReplicaMetrics:
    """Parse a page. Unknown metrics are left out, since a replica may run any engine. Sums values over label sets."""
    page = text.encode(errors="replace")
    residuals: dict[float, float] = {}
    for labels, count in samples(page, _RESIDUALS):
        with contextlib.suppress(ValueError):
            bound = float(label(labels, b"le") or "")
            if not math.isnan(bound):
                residuals[bound] = residuals.get(bound, 0.0) + count
    return ReplicaMetrics(values=known_metrics(page), step_residuals=residuals if any(residuals.values()) else {})


def steps_between(before: ReplicaMetrics, after: ReplicaMetrics) -> dict[float, float]:
    """Steps between two readings by upper bound, not cumulative. Empty if the replica was restarted in between."""
    found: dict[float, float] = {}
    so_far = 0.0
    for bound in sorted(after.step_residuals):
        cumulative = after.step_residuals[bound] - before.step_residuals.get(bound, 0.0)
        if cumulative < so_far:
            return {}
        found[bound] = cumulative - so_far
        so_far = cumulative
    return found


def median_ratio(steps: Mapping[float, float]) -> float | None:
    """The median of a histogram, linear within its bucket; None if it is empty."""
    total = sum(steps.values())
    if total <= 0:
        return None
    below, counted = 0.0, 0.0
    for bound in sorted(steps):
        count = steps[bound]
        if counted + count >= total / 2:
            if bound == float("inf"):
                return below or RATIO_BUCKETS[-1]
            low = below or bound / 2
            return low + (bound - low) * (total / 2 - counted) / count
        counted += count
        below = bound
    return None
