"""How a dispatcher queues, routes and judges its backends. Its defaults are those of the gateway's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Routing = Literal["prefix", "least-outstanding", "session", "weighted"]
ROUTINGS: tuple[Routing, ...] = get_args(Routing)


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchOptions:
    """Times in seconds. The first group can be set by users; the rest are constants that tests shorten."""

    routing: Routing = "prefix"
    max_waiting_per_replica: int = 2  # requests that a backend gets beyond max_num_seqs
    max_queued_requests: int = 4096
    max_queued_tokens: int = 16_000_000
    max_queue_wait_s: float = 60.0  # in the queue, whatever the request's deadline
    default_deadline_s: float | None = None  # from arrival to first token, for requests that name no deadline
    retry_budget_ratio: float = 0.2  # of the live requests of a tenant, that may be retries

    overload_grace_s: float = 3.0  # waits beyond the SLO's TTFT must last so long before requests are refused for it …
    recovery_grace_s: float = 10.0  # … and so long while a replica is missing, or has been in this time

    unhealthy_threshold: int = 2  # failed probes in a row that eject a backend …
    healthy_threshold: int = 2  # … and good ones that bring it back
    hang_timeout_s: float = 5.0  # without a byte on any stream that had begun
    hang_gap_multiplier: float = 20.0  # or so many usual gaps between bytes, if that is longer
    min_prefill_rate: float = 50.0  # tokens a second of a prompt, for which an engine may keep all streams waiting
    metrics_interval_s: float = 1.0  # between two reports of a backend's load

    eject_after_failures: int = 3  # requests in a row
    eject_error_ratio: float = 0.5  # of at least `eject_min_requests` in the last `eject_window_s`
    eject_min_requests: int = 10
    eject_window_s: float = 10.0
    base_ejection_s: float = 5.0  # the first time; doubled each time after that …
    max_ejection_s: float = 60.0  # … up to this

    min_retries: int = 10  # allowed in any `retry_window_s`, however few requests are live
    retry_window_s: float = 10.0

    max_prefix_blocks: int = 50_000  # remembered of each backend
    max_sessions: int = 100_000
    affinity_lookahead: int = 16  # requests of one tenant, of which the one that suits a backend best may go first
