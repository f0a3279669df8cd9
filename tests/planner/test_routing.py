"""Routing: who gets the next request."""

from __future__ import annotations

from powerband.planner.simulation.routing import ByPromptLength, LeastOutstanding, Sticky


def test_the_least_outstanding_work_is_next() -> None:
    policy = LeastOutstanding(2)
    policy.sent(0, 100)
    assert policy.choose(10) == 1
    policy.sent(1, 200)
    assert policy.choose(10) == 0
    policy.answered(1, 200)
    assert policy.choose(10) == 1


def test_idle_replicas_take_turns() -> None:
    policy = LeastOutstanding(3, "requests")
    assert [policy.choose(10) for _ in range(4)] == [0, 1, 2, 0]


def test_pools_take_prompts_up_to_their_length() -> None:
    policy = ByPromptLength([100, 1000], [LeastOutstanding(2), LeastOutstanding(1), LeastOutstanding(2)])
    assert [policy.choose(n) for n in (100, 1, 101, 1000, 1001, 5000)] == [0, 1, 2, 2, 3, 4]
    policy.sent(2, 5)
    policy.answered(2, 5)


def test_a_session_stays_until_it_is_forgotten() -> None:
    policy = Sticky(LeastOutstanding(3), max_sessions=2)
    assert [policy.choose(1, s) for s in ("a", "b", "a", "b", "a")] == [0, 1, 0, 1, 0]
    assert policy.choose(1, "c") == 2  # and "b" is forgotten
    assert [policy.choose(1, ""), policy.choose(1, "b")] == [0, 1]
    assert policy.choose(1, "b") == 1
