"""What keeps the SLO: simulations, load tests and live traffic agree, and live traffic has its excuses."""

from __future__ import annotations

import pytest

from powerband.metrics.record import Outcome, RequestRecord
from powerband.metrics.slo import live_slo_misses, slo_misses
from powerband.spec.slo import SLO

TTFT = SLO(ttft_s=0.5)
E2E = SLO(ttft_s=0.5, e2e_s=5.0)
STALL = SLO(ttft_s=0.5, stall_s=1.0)


def record(first_s: float | None, outcome: Outcome = Outcome.OK) -> RequestRecord:
    times = () if first_s is None else (first_s, first_s + 1)
    return RequestRecord(
        scheduled_s=0, sent_s=0, chunk_times_s=times, chunk_tokens=(1,) * len(times), outcome=outcome, output_tokens=2
    )


@pytest.mark.parametrize(("first_s", "misses"), [(0.4, []), (0.6, ["ttft"])])
def test_a_streamed_answer_is_judged_alike_everywhere(first_s: float, misses: list[str]) -> None:
    assert slo_misses(record(first_s), TTFT) == misses
    assert live_slo_misses(record(first_s), TTFT, status=200, seconds=9, is_first_token_seen=True) == misses


@pytest.mark.parametrize(
    ("first_s", "outcome", "slo", "status", "seconds", "is_seen", "misses"),
    [
        (None, Outcome.REFUSED, TTFT, 429, 0, False, None),  # a key over its own limit
        (None, Outcome.REFUSED, TTFT, 503, 0, False, ["refused"]),  # all replicas are busy
        (3.0, Outcome.OK, TTFT, 200, 3, False, []),  # not streamed: its TTFT is unknown
        (6.0, Outcome.OK, E2E, 200, 6, False, ["e2e"]),
        (None, Outcome.ABORTED, TTFT, 499, 0.2, True, None),  # the client left at once
        (None, Outcome.ABORTED, TTFT, 499, 10, True, ["ttft"]),  # ... or because nothing came
        (0.4, Outcome.ABORTED, TTFT, 499, 1, True, None),  # ... or in the middle of a fast answer
        (0.6, Outcome.ABORTED, TTFT, 499, 1, True, ["ttft"]),
        (0.4, Outcome.ABORTED, E2E, 499, 5.1, True, ["e2e"]),  # ... or because the rest took too long
        (0.4, Outcome.ABORTED, STALL, 499, 1.9, True, None),
        (0.4, Outcome.ABORTED, STALL, 499, 2.5, True, ["stall"]),  # ... or because nothing more came
        (None, Outcome.ABORTED, E2E, 499, 4.9, False, None),  # not streamed: its first token may have been made
        (None, Outcome.ABORTED, E2E, 499, 5.1, False, ["e2e"]),
        (0.4, Outcome.ABORTED, TTFT, 502, 1, True, ["aborted"]),  # the replica broke off
    ],
)
def test_live_traffic_has_excuses(
    first_s: float | None,
    outcome: Outcome,
    slo: SLO,
    status: int,
    seconds: float,
    is_seen: bool,
    misses: list[str] | None,
) -> None:
    given = record(first_s, outcome)
    assert live_slo_misses(given, slo, status=status, seconds=seconds, is_first_token_seen=is_seen) == misses
