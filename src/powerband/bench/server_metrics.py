"""The server's own metrics, scraped once a second, under one set of names."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from powerband.bench.client.http import get
from powerband.bench.client.messages import ServerAddress
from powerband.engines.metrics import parse_metrics

INTERVAL_S = 1.0


@dataclass(slots=True)
class ServerMetrics:
    """The server's metrics during a run."""

    times_s: list[float] = field(default_factory=list)  # from the run's start
    # For each metric as many as times_s; None where it was not reported.
    values: dict[str, list[float | None]] = field(default_factory=dict)
    problem: str = ""

    def add(self, time_s: float, seen: Mapping[str, float]) -> None:
        for name in {*self.values, *seen}:
            self.values.setdefault(name, [None] * len(self.times_s)).append(seen.get(name))
        self.times_s.append(time_s)

    def growth(self, name: str) -> float | None:
        """Of a counter, from the first scrape to the last."""
        values = [value for value in self.values.get(name, ()) if value is not None]
        return values[-1] - values[0] if len(values) > 1 else None

    def mean(self, histogram: str) -> float | None:
        """Of what a histogram counted between the first scrape and the last."""
        count, total = self.growth(f"{histogram}_count"), self.growth(f"{histogram}_sum")
        return total / count if count and total is not None else None


async def scrape(target: ServerAddress, start_at: float, into: ServerMetrics, url: str = "") -> None:
    """Scrape until cancelled. url: of the metrics; '': /metrics of the server. `problem` holds failures."""
    due_s = start_at
    while True:
        await asyncio.sleep(max(due_s - time.monotonic(), 0.0))
        due_s = max(due_s + INTERVAL_S, time.monotonic())
        try:
            page = await get(target, url or "/metrics", timeout_s=5.0)
            if page.status != 200:
                into.problem = f"/metrics answers {page.status}"
                return
            into.add(time.monotonic() - start_at, parse_metrics(page.body))
        except (OSError, ValueError, TimeoutError) as problem:
            into.problem = f"/metrics: {problem}"
