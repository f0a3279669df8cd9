"""Options of a dispatcher: queueing, routing and outlier ejection. The defaults are those of the gateway's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Routing = Literal["prefix", "least-outstanding", "session", "weighted"]
ROUTINGS: tuple[Routing, ...] = get_args(Routing)


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchOptions:
    """Times in seconds. The first group can be set by users; the rest are constants that tests shorten."""

    routing: Routing = "prefix"
    max_waiting_per_replica: int = 2  # requests sent to a backend beyond its max_num_seqs
    max_queued_requests: int = 4096
    max_queued_tokens: int = 16_000_000
    max_queue_wait_s: float = 60.0  # in the queue, whatever the request's deadline
    default_deadline_s: float | None = None  # from arrival to first token, for requests that name no deadline
    retry_budget_ratio: float = 0.2  # maximum retries, relative to a tenant's live requests

    overload_grace_s: float = 3.0  # waits must exceed the SLO's TTFT for so long before requests are rejected for it …
    recovery_grace_s: float = 10.0  # … and for so long while a replica is missing or has just recovered

    unhealthy_threshold: int = 2  # consecutive failed probes that eject a backend …
    healthy_threshold: int = 2  # … and consecutive successful ones that readmit it
    hang_timeout_s: float = 5.0  # silence of all streams after which a backend counts as hung …
    hang_gap_multiplier: float = 20.0  # … or this multiple of the mean gap between bytes, if longer
    min_prefill_rate: float = 50.0  # prompt tokens per second; allows for silence while new prompts are prefilled
    metrics_interval_s: float = 1.0  # between two reports of a backend's load

    eject_after_failures: int = 3  # consecutive failed requests
    eject_error_ratio: float = 0.5  # among at least `eject_min_requests` in the last `eject_window_s`
    eject_min_requests: int = 10
    eject_window_s: float = 10.0
    base_ejection_s: float = 5.0  # the first time; doubled each time after that …
    max_ejection_s: float = 60.0  # … up to this

    min_retries: int = 10  # allowed in any `retry_window_s`, however few requests are live
    retry_window_s: float = 10.0

    max_prefix_blocks: int = 50_000  # remembered per backend
    max_sessions: int = 100_000
    affinity_lookahead: int = 16  # how many of a tenant's queued requests are compared by affinity
