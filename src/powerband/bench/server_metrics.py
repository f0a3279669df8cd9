"""The server's own metrics, scraped once a second, under one set of names.

Understands Powerband, vLLM, SGLang and llama.cpp; what a server does not report is left out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from powerband.bench.client.http import get
from powerband.bench.client.messages import ServerAddress
from powerband.metrics.exposition import total

INTERVAL_S = 1.0
# Our name → the server's names for the same (sum over label sets). The first that is there counts.
GAUGES = {
    "running": (
        "powerband_requests_running",
        "vllm:num_requests_running",
        "sglang:num_running_reqs",
        "llamacpp:requests_processing",
    ),
    "waiting": (
        "powerband_requests_waiting",
        "vllm:num_requests_waiting",
        "sglang:num_queue_reqs",
        "llamacpp:requests_deferred",
    ),
    "kv_usage": (
        "powerband_kv_cache_usage_ratio",
        "vllm:kv_cache_usage_perc",
        "vllm:gpu_cache_usage_perc",
        "sglang:token_usage",
        "llamacpp:kv_cache_usage_ratio",
    ),
}
COUNTERS = {
    "preemptions": ("powerband_preemptions_total", "vllm:num_preemptions_total", "sglang:num_retracted_reqs"),
    "prefix_queries": ("powerband_prefix_cache_queries_total", "vllm:prefix_cache_queries_total"),
    "prefix_hits": ("powerband_prefix_cache_hits_total", "vllm:prefix_cache_hits_total"),
    "prompt_tokens": (
        "powerband_prompt_tokens_total",
        "vllm:prompt_tokens_total",
        "sglang:prompt_tokens_total",
        "llamacpp:prompt_tokens_total",
    ),
    "output_tokens": (
        "powerband_generation_tokens_total",
        "vllm:generation_tokens_total",
        "sglang:generation_tokens_total",
        "llamacpp:tokens_predicted_total",
    ),
}
HISTOGRAMS = {
    "ttft": ("powerband_ttft_seconds", "vllm:time_to_first_token_seconds", "sglang:time_to_first_token_seconds"),
    "queue": ("powerband_queue_seconds", "vllm:request_queue_time_seconds", "sglang:queue_time_seconds"),
}


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


def known_metrics(page: bytes) -> dict[str, float]:
    """Gauges and counters on a page of metrics, under our names."""
    found: dict[str, float] = {}
    for ours, names in (GAUGES | COUNTERS).items():
        value = next((value for name in names if (value := total(page, name.encode())) is not None), None)
        if value is not None:
            found[ours] = value
    return found


def parse_metrics(page: bytes) -> dict[str, float]:
    """All figures on a page of metrics; histograms as NAME_count and NAME_sum."""
    found = known_metrics(page)
    for ours, names in HISTOGRAMS.items():
        for name in names:
            count, seconds = (total(page, f"{name}_{part}".encode()) for part in ("count", "sum"))
            if count is not None and seconds is not None:
                found |= {f"{ours}_count": count, f"{ours}_sum": seconds}
                break
    return found


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
