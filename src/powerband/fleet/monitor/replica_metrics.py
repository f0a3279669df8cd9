"""The few figures of a replica's /metrics that the watcher goes by, of any engine. Read fast: once a second."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from powerband.bench.server_metrics import known_metrics
from powerband.metrics.exposition import label, samples
from powerband.metrics.prometheus import RATIO_BUCKETS

_RESIDUAL = b"powerband_step_residual_ratio_bucket"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaFigures:
    """values: by the names of bench.server_metrics; what a replica does not tell is not there. residuals: steps by
    upper bound of observed / predicted seconds, cumulative; empty: its engine is not calibrated.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    residuals: Mapping[float, float] = field(default_factory=dict)

    @property
    def tokens(self) -> float | None:
        """Read and made since the replica's start: what grows while it makes progress."""
        told = [self.values[name] for name in ("prompt_tokens", "output_tokens") if name in self.values]
        return sum(told) if told else None


def read_figures(text: str) -> ReplicaFigures:
    """What cannot be read is left out: a replica may be of any make. Values are summed over label sets."""
    page = text.encode(errors="replace")
    residuals: dict[float, float] = {}
    for labels, count in samples(page, _RESIDUAL):
        with contextlib.suppress(ValueError):
            bound = float(label(labels, b"le") or "")
            if not math.isnan(bound):
                residuals[bound] = residuals.get(bound, 0.0) + count
    return ReplicaFigures(values=known_metrics(page), residuals=residuals if any(residuals.values()) else {})


def steps_between(before: ReplicaFigures, after: ReplicaFigures) -> dict[float, float]:
    """Steps by upper bound that came between two looks, not cumulative. Empty when the replica began anew."""
    found: dict[float, float] = {}
    so_far = 0.0
    for bound in sorted(after.residuals):
        cumulative = after.residuals[bound] - before.residuals.get(bound, 0.0)
        if cumulative < so_far:
            return {}
        found[bound] = cumulative - so_far
        so_far = cumulative
    return found


def median_ratio(steps: Mapping[float, float]) -> float | None:
    """The median of what a histogram counted, linear within its bucket; None for nothing."""
    total = sum(steps.values())
    if total <= 0:
        return None
    below, seen = 0.0, 0.0
    for bound in sorted(steps):
        count = steps[bound]
        if seen + count >= total / 2:
            if bound == float("inf"):
                return below or RATIO_BUCKETS[-1]
            low = below or bound / 2
            return low + (bound - low) * (total / 2 - seen) / count
        seen += count
        below = bound
    return None
