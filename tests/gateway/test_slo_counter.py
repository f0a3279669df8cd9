"""What `status` counts: the requests of the present plan, by the definition that the gateway's metrics use."""

from __future__ import annotations

from requests_for_tests import finished

from powerband.fleet.control.slo_counter import SLOCounter
from powerband.gateway.observability.slo import slo_violations
from powerband.metrics.record import Outcome
from powerband.spec.slo import SLO

FIRST = {"slo": {"ttft_s": 1.0}, "promise": {"rate": 2.0}}
SECOND = {"slo": {"ttft_s": 2.0}, "promise": {"rate": 2.0}}
LIMIT = SLO(ttft_s=1.0)
SERVED = finished(ttft_s=0.1)
SLOW = finished(ttft_s=3.0)
REFUSED = [finished(tokens=0, outcome=Outcome.REFUSED, status=status) for status in (400, 404, 413, 429)]


def test_errors_of_clients_are_no_broken_promises() -> None:
    counter = SLOCounter()
    counter.count([SERVED, *REFUSED, SLOW], FIRST, LIMIT)
    assert (counter.good, counter.scheduled) == (1, 2)
    assert [slo_violations(one, LIMIT) for one in (SERVED, SLOW, *REFUSED)] == [[], ["ttft"], None, None, None, None]


def test_another_plan_begins_at_nothing_and_the_same_one_goes_on() -> None:
    counter = SLOCounter()
    counter.count([SLOW, SERVED], FIRST, LIMIT)
    counter.count([SERVED], dict(reversed(FIRST.items())), LIMIT)
    assert (counter.good, counter.scheduled) == (2, 3)
    counter.count([SERVED], SECOND, SLO(ttft_s=2.0))
    assert (counter.good, counter.scheduled) == (1, 1)


def test_a_new_controller_goes_on_with_the_counts_of_the_same_plan_only() -> None:
    before, same, other = SLOCounter(), SLOCounter(), SLOCounter()
    before.count([SLOW, SERVED], FIRST, LIMIT)
    load = before.load(requests_per_s=0.0, running=0, queued=0, next_record=3)
    same.resume(load)
    same.count([SERVED], FIRST, LIMIT)
    assert (same.good, same.scheduled, same.since) == (2, 3, before.since)
    other.resume(load)
    other.count([], SECOND, SLO(ttft_s=2.0))
    assert (other.good, other.scheduled) == (0, 0)
