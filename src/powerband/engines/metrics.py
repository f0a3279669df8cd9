"""Parses any engine's Prometheus metrics into one set of names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from powerband.engines.base import Histogram, Metric
from powerband.engines.registry import ADAPTERS
from powerband.metrics.exposition import total

_METRICS: dict[Metric, tuple[bytes, ...]] = {
    metric: tuple(name for adapter in ADAPTERS.values() for name in adapter.metrics.get(metric, ()))
    for metric in get_args(Metric)
}
_HISTOGRAMS: dict[Histogram, tuple[bytes, ...]] = {
    histogram: tuple(a.histograms[histogram] for a in ADAPTERS.values() if histogram in a.histograms)
    for histogram in get_args(Histogram)
}


def first_total(page: bytes, names: Iterable[bytes]) -> float | None:
    """The sum over label sets of the first metric that the page has."""
    return next((value for name in names if (value := total(page, name)) is not None), None)


def known_metrics(page: bytes) -> dict[str, float]:
    """Gauges and counters on a page of metrics, by Powerband's names. Metrics that the engine lacks are left out."""
    found = {metric: first_total(page, names) for metric, names in _METRICS.items()}
    return {metric: value for metric, value in found.items() if value is not None}


def parse_metrics(page: bytes) -> dict[str, float]:
    """All figures on a page of metrics; histograms as NAME_count and NAME_sum."""
    found = known_metrics(page)
    for histogram, names in _HISTOGRAMS.items():
        for name in names:
            count, seconds = total(page, name + b"_count"), total(page, name + b"_sum")
            if count is not None and seconds is not None:
                found |= {f"{histogram}_count": count, f"{histogram}_sum": seconds}
                break
    return found
