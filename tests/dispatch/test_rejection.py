"""The backoff after a backend's rejections, by itself."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from powerband.dispatch.rejection import RejectionBackoff


@dataclass
class Sent:
    sent_s: float
    tenant: str = "a"


def test_a_rejection_without_retry_after_pauses_its_tenant_alone_for_half_a_second() -> None:
    backoff = RejectionBackoff()
    backoff.rejected(Sent(0.0, "a"), 10.0, 0.0)
    assert not backoff.allows_tenant("a", 10.49)
    assert backoff.allows_tenant("a", 10.5)
    assert backoff.allows_tenant("b", 10.0)
    assert backoff.allows(10.0, [Sent(10.0)]), "several requests at once"


def test_pauses_double_with_each_rejected_trial_up_to_what_the_backend_asked_for() -> None:
    backoff, now_s, pauses_s = RejectionBackoff(), 0.0, []
    for _ in range(5):
        backoff.rejected(Sent(now_s), now_s, 10.0)
        pauses_s.append(backoff.paused_until_s - now_s)
        now_s = backoff.paused_until_s
    assert pauses_s == pytest.approx([1, 2, 4, 8, 10])


def test_rejections_of_requests_that_were_sent_before_the_pause_count_once() -> None:
    backoff = RejectionBackoff()
    for _ in range(5):
        backoff.rejected(Sent(0.0), 1.0, 60.0)
    assert backoff.paused_until_s == 2.0


def test_after_a_pause_one_trial_request_is_sent_until_it_is_accepted_or_a_second_has_passed() -> None:
    backoff, trial = RejectionBackoff(), Sent(2.0)
    backoff.rejected(Sent(0.0), 0.0, 2.0)
    assert backoff.allows(2.0, [Sent(0.0)])
    backoff.sent(trial, [Sent(0.0)])
    assert not backoff.allows(2.9, [trial])
    assert backoff.allows(3.0, [trial])
    backoff.accepted(trial, 2.5)
    assert backoff.allows(2.9, [trial])


def test_a_trial_that_is_not_rejected_in_time_counts_for_its_own_tenant() -> None:
    backoff, trial = RejectionBackoff(), Sent(1.0, "a")
    backoff.rejected(Sent(0.0, "a"), 0.0, 1.0)
    backoff.sent(trial, [])
    backoff.sent(Sent(2.0, "b"), [trial])
    assert backoff.allows(2.0, [trial, Sent(2.0, "b")]), "no more trials"
    assert not backoff.ignores("a", 2.0), "no request of another tenant was accepted"


def test_a_tenant_that_is_rejected_alone_is_ignored_for_a_minute() -> None:
    backoff = RejectionBackoff()
    backoff.rejected(Sent(0.0, "a"), 0.0, 1.0)
    backoff.accepted(Sent(1.0, "b"), 2.0)
    assert backoff.ignores("a", 61.9)
    assert not backoff.ignores("a", 62.0)
    assert not backoff.ignores("b", 2.0)
