"""The few figures of a replica's /metrics that the watcher goes by, of any engine. Read fast: once a second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from powerband.bench.server_metrics import COUNTERS, GAUGES
from powerband.metrics.prometheus import RATIO_BUCKETS

_RESIDUAL = "powerband_step_residual_ratio_bucket"
_NAMES = {name: ours for ours, names in (GAUGES | COUNTERS).items() for name in names}


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
    values: dict[str, float] = {}
    residuals: dict[float, float] = {}
    taken: dict[str, str] = {}  # by figure, under which name it was told: the first counts
    for line in text.splitlines():
        end = line.find("{")
        name = line[:end] if end >= 0 else line.partition(" ")[0]
        try:
            if name == _RESIDUAL:
                bound = float(line.split('le="', 1)[1].split('"', 1)[0])
                residuals[bound] = residuals.get(bound, 0.0) + float(line.rpartition(" ")[2])
            elif (ours := _NAMES.get(name)) is not None and taken.setdefault(ours, name) == name:
                values[ours] = values.get(ours, 0.0) + float(line.rpartition(" ")[2])
        except (ValueError, IndexError):
            continue
    return ReplicaFigures(values=values, residuals=residuals if any(residuals.values()) else {})


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
