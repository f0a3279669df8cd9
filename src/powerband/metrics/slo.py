"""The one definition of "kept the SLO": for simulations and load tests, and, with its excuses, for live traffic."""

from __future__ import annotations

import math
from dataclasses import replace

from powerband.metrics.record import Outcome, RequestRecord
from powerband.spec.slo import SLO

_CLIENT_ERRORS = range(400, 500)
_CLIENT_LEFT = 499


def slo_misses(record: RequestRecord, slo: SLO) -> list[str] | None:
    """Why a request does not count as good: its outcome, or the figures over their limits; empty: it does. None: the
    request does not count, because the client abandoned it before any limit had passed.

    An answer without a token has no TTFT and no E2E: it misses a limit on them. TPOT and stall it keeps, as one of a
    single token does.
    """
    if record.outcome is Outcome.ABORTED:
        return _passed_limits(record, slo) or None
    if record.outcome is not Outcome.OK:
        return [record.outcome.value]
    found = ["invalid"] if record.is_valid is False else []
    for name, limit_s in slo.limits.items():
        value: float | None = getattr(record, f"{name}_s")
        if value > limit_s if value is not None else name in ("ttft", "e2e"):
            found.append(name)
    return found


def live_slo_misses(
    record: RequestRecord,
    slo: SLO,
    *,
    status: int,  # HTTP status; 499: the client left
    seconds: float,  # from arrival to end
    is_first_token_seen: bool,  # false for an answer that came as a whole
) -> list[str] | None:
    """Like `slo_misses`, for a request of live traffic; None: the request does not count.

    Requests that were refused through the client's own fault (a limit of its key, a wrong field) do not count, and
    neither do those whose client left before a limit had passed: people press stop. A client that left because it
    took too long does count. An answer that came as a whole, or would have, is held to the E2E limit alone: its TTFT
    is unknown.
    """
    max_e2e_s = slo.limits.get("e2e", math.inf)
    if record.outcome is Outcome.ABORTED:
        if status != _CLIENT_LEFT:
            return [Outcome.ABORTED.value]
        if not is_first_token_seen:
            return ["e2e"] if seconds > max_e2e_s else None
        return slo_misses(replace(record, ended_s=record.scheduled_s + seconds), slo)
    if record.outcome is Outcome.REFUSED and status in _CLIENT_ERRORS:
        return None
    if record.outcome is Outcome.OK and not is_first_token_seen:
        return ["e2e"] if seconds > max_e2e_s else []
    return slo_misses(record, slo)


def _passed_limits(record: RequestRecord, slo: SLO) -> list[str]:
    """The limits that had passed when the client abandoned the request. TPOT is that of the tokens until then."""
    times_s = record.chunk_times_s
    ended_s = record.ended_s if record.ended_s is not None else max((record.sent_s, *times_s[-1:]))
    waited_s = ended_s - record.scheduled_s
    reached: dict[str, float | None] = {
        "ttft": record.ttft_s if times_s else waited_s,
        "tpot": record.tpot_s,
        "stall": max(record.stall_s or 0.0, ended_s - times_s[-1]) if times_s else None,
        "e2e": waited_s,
    }
    return [name for name, limit_s in slo.limits.items() if (reached[name] or 0.0) > limit_s]
