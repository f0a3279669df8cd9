"""How a pool queues, routes and judges its replicas. Fields of GatewaySettings with the same names end up here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Routing = Literal["prefix", "least-outstanding", "session", "weighted"]
ROUTINGS: tuple[Routing, ...] = get_args(Routing)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions:
    """Times in seconds. The first group are settings; the rest are constants that tests shorten.

    longest_wait_s: nobody waits here longer, whatever his deadline. default_deadline_s: from arrival to first token,
    for requests that name none. retry_share: of the live requests, that may be second attempts.
    """

    routing: Routing = "prefix"
    max_waiting_per_replica: int = 2  # beyond max_num_seqs
    max_queued_requests: int = 4096
    max_queued_tokens: int = 16_000_000
    longest_wait_s: float = 60.0
    default_deadline_s: float | None = None
    overload_after_s: float = 3.0  # of waits beyond the SLO's TTFT, in which nobody is refused for it …
    mending_s: float = 10.0  # … and the same while a replica is missing, or has been lately

    probe_every_s: float = 0.5
    probe_timeout_s: float = 1.0
    load_every_s: float = 1.0  # how often a replica's metrics are read
    fall: int = 2  # probes in a row that find a replica at fault …
    rise: int = 2  # … and well again
    hung_after_s: float = 5.0  # no byte on any stream that had begun
    hung_after_gaps: float = 20.0  # or so many usual gaps, if that is longer

    eject_after_failures: int = 3  # requests in a row
    eject_after_share: float = 0.5  # of at least `eject_after_requests` in the last `eject_window_s`
    eject_after_requests: int = 10
    eject_window_s: float = 10.0
    eject_s: float = 5.0  # the first time; doubled each time after that …
    longest_eject_s: float = 60.0  # … up to this

    retry_share: float = 0.2
    fewest_retries: int = 10  # in any `retry_window_s`
    retry_window_s: float = 10.0

    prefix_blocks: int = 50_000  # remembered of each replica
    most_sessions: int = 100_000
    look_ahead: int = 16  # requests of one tenant among which the one that suits a replica best may go first
