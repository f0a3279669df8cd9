"""Whether a live request met the SLO, as defined in metrics.slo."""

from __future__ import annotations

from powerband.gateway.request import CompletedRequest
from powerband.metrics.slo import live_slo_misses
from powerband.spec.slo import SLO


def slo_violations(finished: CompletedRequest, slo: SLO) -> list[str] | None:
    """The objectives that a request missed; empty: it met the SLO. None: it does not count."""
    return live_slo_misses(
        finished.record,
        slo,
        status=finished.status,
        seconds=finished.seconds,
        is_first_token_seen=has_first_token(finished),
    )


def has_first_token(finished: CompletedRequest) -> bool:
    """Whether TTFT and TPOT are known: the response was streamed, at least from the replica to the gateway."""
    return finished.request.stream or len(finished.record.chunk_times_s) > 1
