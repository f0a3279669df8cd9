"""Whether a live request kept the promise: metrics.figures' verdict, and what to think of clients that leave."""

from __future__ import annotations

from dataclasses import replace

from powerband.gateway.request import Finished
from powerband.metrics.figures import missed
from powerband.metrics.record import Outcome
from powerband.spec.slo import SLO

# What a client is told it did wrong; a load test that sends such requests counts them, live traffic does not.
_CLIENTS_FAULT = range(400, 500)


def verdict(finished: Finished, slo: SLO) -> list[str] | None:
    """Why a request missed the SLO, as `missed` says it; empty: it kept it. None: it does not count.

    What does not count: a request that was refused for the client's own fault (a limit of its key, a wrong field), and
    one whose client left before a limit was broken: people press stop. Who left because it took too long does count.
    """
    record = finished.record
    if record.outcome is Outcome.ABORTED:
        limits = slo.limits
        waited_in_vain = not record.chunk_times_s and finished.seconds > limits.get("ttft", limits.get("e2e", 1e9))
        seen = missed(replace(record, outcome=Outcome.OK), slo) if record.chunk_times_s else []
        return ["ttft"] if waited_in_vain else seen or None
    if record.outcome is Outcome.REFUSED and finished.status in _CLIENTS_FAULT:
        return None
    return missed(record, slo)
