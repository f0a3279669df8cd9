"""Figures of a scheduler: counters that it keeps, and a frozen picture of them for metrics and operators."""

from __future__ import annotations

from dataclasses import dataclass

from powerband.core.kv_cache import CacheUsage


@dataclass(slots=True)
class Counters:
    """What a scheduler has done since it was made. All in tokens, except where the name says otherwise."""

    num_steps: int = 0
    num_requests: int = 0  # accepted
    num_preemptions: int = 0
    prompt_tokens: int = 0  # of requests that were started
    generation_tokens: int = 0
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hits: int = 0  # of these, found


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Where a scheduler stands, and its counters. Prefix figures are in tokens."""

    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    paused: bool
    cache: CacheUsage
    num_refused: int
    num_steps: int
    num_requests: int
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int
    prefix_queries: int
    prefix_hits: int
