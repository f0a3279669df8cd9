"""From the figures of all runs to the table and the JSON."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cpu import rows
from benchmarks.cpu.engines import PRECISIONS, Variant

Limit = Callable[[rows.Metric, str], float | None]


@dataclass
class Figures:
    """Samples by variant and metric, and what each variant's runs said about themselves."""

    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    others: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of whole runs

    def add(self, variant: str, result: dict[str, Any]) -> None:
        for kind, store in (("metrics", self.samples), ("others", self.others)):
            for key, value in result[kind].items():
                store.setdefault(variant, {}).setdefault(key, []).append(value)
        self.versions |= result["versions"]

    def median(self, variant: str, key: str) -> float | None:
        values = self.samples.get(variant, {}).get(key)
        return statistics.median(values) if values else None

    def spread(self, variant: str, key: str) -> float:
        """(largest - smallest) / median"""
        values = self.samples[variant][key]
        middle = statistics.median(values)
        return (max(values) - min(values)) / abs(middle) if middle else 0.0

    def slow_rows(self, variants: list[Variant], factor: float) -> dict[str, set[str]]:
        """Rows, by peer, in which it was more than `factor` times worse than the best peer in every metric."""
        found: dict[str, set[str]] = {}
        for variant in variants:
            rivals = [v for v in variants if v.precision == variant.precision and not v.is_ours]
            if variant.is_ours:
                continue
            for row in rows.ROWS:
                pairs = [self._against_best(variant, rivals, metric) for metric in rows.metrics(row)]
                known = [pair for pair in pairs if pair is not None]
                if known and min(known) > factor:
                    found.setdefault(variant.name, set()).add(row)
        return found

    def _against_best(self, variant: Variant, rivals: list[Variant], metric: rows.Metric) -> float | None:
        own, best = self.median(variant.name, metric.key), best_of(self, rivals, metric)
        return None if own is None or best is None else ratio(metric, best[1], own)


def best_of(figures: Figures, variants: list[Variant], metric: rows.Metric) -> tuple[str, float] | None:
    found = [(v.name, value) for v in variants if (value := figures.median(v.name, metric.key)) is not None]
    if not found:
        return None
    return (max if metric.more_is_better else min)(found, key=lambda item: item[1])


def ratio(metric: rows.Metric, ours: float, other: float) -> float | None:
    """How many times as good `ours` is; None where a figure is not above 0 (a cost that vanishes in the noise)."""
    if ours <= 0 or other <= 0:
        return None
    return ours / other if metric.more_is_better else other / ours


@dataclass(frozen=True)
class Line:
    """One metric at one precision."""

    key: str
    title: str
    unit: str
    precision: str
    ours: float
    spread: float
    peer: str | None
    peer_value: float | None
    peer_spread: float | None
    times_peer: float | None
    times_bf16_peer: float | None  # against the best peer in bf16
    limit: float | None
    of_limit: float | None


def lines(figures: Figures, variants: list[Variant], selected: str, limit: Limit) -> list[Line]:
    """All lines for which ours was measured."""
    made = []
    for precision in PRECISIONS:
        same = [variant for variant in variants if variant.precision == precision]
        ours = next((variant.name for variant in same if variant.is_ours), None)
        for metric in rows.metrics(selected) if ours else []:
            value = figures.median(ours, metric.key) if ours else None
            if ours is None or value is None:
                continue
            peer = best_of(figures, [v for v in same if not v.is_ours], metric)
            plain = best_of(figures, [v for v in variants if v.precision == "bf16" and not v.is_ours], metric)
            most = limit(metric, precision)
            made.append(
                Line(
                    metric.key,
                    metric.title,
                    metric.unit,
                    precision,
                    value,
                    figures.spread(ours, metric.key),
                    peer[0] if peer else None,
                    peer[1] if peer else None,
                    figures.spread(peer[0], metric.key) if peer else None,
                    ratio(metric, value, peer[1]) if peer else None,
                    ratio(metric, value, plain[1]) if plain else None,
                    most,
                    ratio(metric, value, most) if most else None,
                )
            )
    return made


def table(made: list[Line]) -> str:
    head = f"{'':49}{'ours':>10}{'spread':>8}  {'best peer':<24}{'spread':>8}{'x peer':>8}{'x bf16':>8}{'of limit':>10}"
    shown = [head]
    previous = ""
    for line in sorted(made, key=lambda line: [metric.key for metric in rows.metrics("abcdefgh")].index(line.key)):
        title = f"{line.title} ({line.unit})" if line.key != previous else ""
        previous = line.key
        peer = f"{line.peer:<16}{line.peer_value:>8.4g}{line.peer_spread:>8.0%}" if line.peer else f"{'-':<16}{'':>16}"
        shown.append(
            f"{title:44}{line.precision:5}{line.ours:>10.4g}{line.spread:>8.0%}  {peer}"
            f"{_number(line.times_peer):>8}{_number(line.times_bf16_peer):>8}{_percent(line.of_limit):>10}"
        )
    return "\n".join(shown)


def peers_table(figures: Figures, variants: list[Variant], selected: str) -> str:
    """Every variant's medians, one line per metric."""
    names = [variant.name for variant in variants if variant.name in figures.samples]
    shown = [f"{'':40}" + "".join(f"{name.replace('powerband', 'ours'):>15}" for name in names)]
    for metric in rows.metrics(selected):
        values = [figures.median(name, metric.key) for name in names]
        if any(value is not None for value in values):
            cells = "".join(f"{'-' if value is None else format(value, '.4g'):>15}" for value in values)
            shown.append(f"{metric.key + ' (' + metric.unit + ')':40}{cells}")
    return "\n".join(shown)


def machine() -> dict[str, str]:
    """Processor and system; nothing that names this computer."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return {
        "processor": names[0] if names else platform.machine(),
        "cpus": str(len(names)),
        "system": platform.system(),
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
