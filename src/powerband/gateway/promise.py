"""Whether a live request kept the promise: metrics.figures' verdict, and what to think of clients that leave."""

from __future__ import annotations

import math
from dataclasses import replace

from powerband.gateway.request import Finished
from powerband.metrics.figures import missed
from powerband.metrics.record import Outcome
from powerband.spec.slo import SLO

# What a client is told it did wrong; a load test that sends such requests counts them, live traffic does not.
_CLIENTS_FAULT = range(400, 500)
_CLIENT_LEFT = 499


def verdict(finished: Finished, slo: SLO) -> list[str] | None:
    """Why a request missed the SLO, as `missed` says it; empty: it kept it. None: it does not count.

    What does not count: a request that was refused for the client's own fault (a limit of its key, a wrong field), and
    one whose client left before a limit was broken: people press stop. Who left because it took too long does count.
    An answer that came as a whole is held to the limit on E2E alone: when its first token was made, nobody saw.
    """
    record, limits = finished.record, slo.limits
    if record.outcome is Outcome.ABORTED:
        if finished.status != _CLIENT_LEFT:
            return [Outcome.ABORTED.value]
        if record.chunk_times_s:
            return missed(replace(record, outcome=Outcome.OK), slo) or None
        broken = [name for name in ("ttft", "e2e") if finished.seconds > limits.get(name, math.inf)]
        return broken or None
    if record.outcome is Outcome.REFUSED and finished.status in _CLIENTS_FAULT:
        return None
    if record.outcome is Outcome.OK and not saw_first_token(finished):
        return ["e2e"] if finished.seconds > limits.get("e2e", math.inf) else []
    return missed(record, slo)


def saw_first_token(finished: Finished) -> bool:
    """Whether TTFT and TPOT can be told: it was streamed, at least from the replica to the gateway."""
    return finished.request.stream or len(finished.record.chunk_times_s) > 1
