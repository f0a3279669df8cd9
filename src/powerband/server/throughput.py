"""A line in the log every ten seconds of activity: throughput, queue and cache, as vLLM has it. None while idle."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping

from powerband.metrics.prometheus import EngineMetrics
from powerband.spec.quantities import count_text

logger = logging.getLogger(__name__)

INTERVAL_S = 10.0


async def log_throughput(metrics: EngineMetrics, interval_s: float = INTERVAL_S) -> None:
    """Until it is cancelled."""
    before, before_s = metrics.figures(), time.monotonic()
    while True:
        await asyncio.sleep(interval_s)
        now, now_s = metrics.figures(), time.monotonic()
        line = throughput_line(before, now, now_s - before_s)
        if line:
            logger.info("%s", line)
        before, before_s = now, now_s


def throughput_line(before: Mapping[str, float], now: Mapping[str, float], seconds: float) -> str:
    """Of two `EngineMetrics.figures()`, `seconds` apart. '': nothing was computed, and nothing waits."""
    # Counts of the scheduler begin again with the engine's process.
    grown = {name: max(now[name] - before[name], 0.0) for name in now}
    tokens = grown["prompt_tokens"] + grown["generation_tokens"]
    if not (tokens or now["num_running"] or now["num_waiting"]):
        return ""
    parts = [
        f"Prompt throughput: {grown['prompt_tokens'] / seconds:.1f} tokens/s",
        f"generation throughput: {grown['generation_tokens'] / seconds:.1f} tokens/s",
        f"running: {count_text(round(now['num_running']), 'request')}",
        f"waiting: {count_text(round(now['num_waiting']), 'request')}",
        f"KV cache usage: {now['kv_usage']:.1%}",
    ]
    if grown["prefix_queries"]:
        parts.append(f"prefix cache hit rate: {grown['prefix_hits'] / grown['prefix_queries']:.1%}")
    return ", ".join(parts)
