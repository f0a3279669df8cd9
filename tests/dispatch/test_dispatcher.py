"""The dispatcher without any event loop: the caller passes the time, and collects what was decided."""

from __future__ import annotations

import heapq
from collections import Counter
from itertools import count

import pytest

from powerband.dispatch.backend import BackendSpec, InFlightRequest, ReplicaLoad
from powerband.dispatch.dispatcher import TICK_S, Dispatcher
from powerband.dispatch.errors import PoolError, PoolFull, QueueTimeout
from powerband.dispatch.options import DispatchOptions
from powerband.dispatch.queue import QueuedRequest
from powerband.dispatch.request import DispatchRequest


def dispatcher(*specs: BackendSpec, **options: object) -> Dispatcher:
    made = Dispatcher(DispatchOptions(**options))  # type: ignore[arg-type]  # fields of it
    made.update(specs or [BackendSpec(id="a", max_num_seqs=1)], 0.0)
    for backend in made.backends:
        backend.probe_succeeded(0.0)
        made.changed(backend, 0.0)
    return made


def request(prompt_tokens: int = 10, **more: object) -> DispatchRequest:
    return DispatchRequest(prompt_tokens=prompt_tokens, output_tokens=10, **more)  # type: ignore[arg-type]  # fields of it


def fill(pool: Dispatcher, count: int) -> list[InFlightRequest]:
    sent = [pool.submit(request(), 0.5) for _ in range(count)]
    return [one for one in sent if isinstance(one, InFlightRequest)]


def test_a_request_is_sent_at_once_or_queued_and_sent_when_a_place_becomes_free() -> None:
    pool = dispatcher()
    sent = fill(pool, 3)  # one runs, two wait at the backend
    queued = pool.submit(request(), 1.0)
    assert isinstance(queued, QueuedRequest)
    assert (pool.queued, list(pool.take_decided())) == (1, [])
    pool.release(sent[0], "ok", 2.5, output_tokens=10)
    assert pool.take_decided() == [queued]
    assert isinstance(queued.outcome, InFlightRequest)
    assert (queued.outcome.backend.id, queued.outcome.queue_s) == ("a", 1.5)


def test_nothing_happens_between_deadlines_and_without_waiting_there_are_none() -> None:
    pool = dispatcher(max_queue_wait_s=7.0)
    pool.tick(TICK_S)  # the last that was due while the backend was not ready
    assert pool.next_deadline() is None
    sent = fill(pool, 3)
    assert pool.next_deadline() is None
    queued = pool.submit(request(), 1.0)
    assert pool.next_deadline() == 1.0 + TICK_S
    while (deadline_s := pool.next_deadline()) is not None:
        pool.tick(deadline_s)
        if pool.take_decided():
            break
    assert deadline_s == pytest.approx(8.0)
    assert isinstance(queued, QueuedRequest)
    assert isinstance(queued.outcome, QueueTimeout)
    pool.release(sent[0], "ok", 9.0)
    while (deadline_s := pool.next_deadline()) is not None and deadline_s < 10.0:
        pool.tick(deadline_s)
    assert pool.next_deadline() is None


def test_a_request_that_is_cancelled_is_never_decided() -> None:
    pool = dispatcher()
    sent = fill(pool, 3)
    queued = pool.submit(request(), 1.0)
    assert isinstance(queued, QueuedRequest)
    pool.cancel(queued, 2.0)
    pool.release(sent[0], "ok", 3.0)
    assert (pool.queued, list(pool.take_decided()), queued.outcome) == (0, [], None)


def test_the_first_end_and_the_first_token_count() -> None:
    pool = dispatcher()
    [sent] = fill(pool, 1)
    for time_s in (0.7, 0.8):
        pool.first_token(sent, time_s)
    assert sent.backend.outstanding == 10
    pool.release(sent, "ok", 1.0)
    pool.release(sent, "failed", 1.0)
    assert (sent.backend.outstanding, len(sent.backend.in_flight), list(sent.backend.errors)) == (0, 0, [])


def test_a_request_that_was_never_sent_teaches_nothing_and_costs_its_tenant_nothing() -> None:
    pool = dispatcher()
    [sent] = fill(pool, 1)
    pool.release(sent, "unsent", 0.5)
    queues = [length_pool.queue for length_pool in pool._pools]
    assert [level.tenants["anonymous"].tag for level in queues[0]._levels.values()] == [0.0]
    assert pool._pools[0].admission.capacity._num_ended == 0


def test_a_backend_that_reports_more_waiting_than_it_should_gets_fewer() -> None:
    pool = dispatcher(BackendSpec(id="a", max_num_seqs=8))
    [backend] = pool.backends
    fill(pool, 10)
    queued = pool.submit(request(), 0.5)
    for time_s in (1.0, 2.0):
        pool.reported(backend, ReplicaLoad(running=4, waiting=6), time_s)
    assert backend.limit == 6
    pool.reported(backend, ReplicaLoad(running=9, waiting=0), 3.0)
    pool.reported(backend, ReplicaLoad(running=9, waiting=0), 4.0)
    assert backend.limit == 10
    assert isinstance(queued, QueuedRequest)
    assert queued.is_queued


def test_long_prompts_wait_for_the_backends_that_take_them() -> None:
    pool = dispatcher(
        BackendSpec(id="short", max_num_seqs=8, max_prompt_tokens=100), BackendSpec(id="any", max_num_seqs=1)
    )
    sent = [pool.submit(request(tokens), 0.0) for tokens in (100, 101, 101, 101, 101)]
    placed = [one.backend.id for one in sent if isinstance(one, InFlightRequest)]
    assert placed == ["short", "any", "any", "any"]
    assert isinstance(sent[-1], QueuedRequest)


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    pool = dispatcher(max_queued_requests=1)
    fill(pool, 3)
    pool.submit(request(), 0.5)
    with pytest.raises(PoolFull) as refusal:
        pool.submit(request(), 0.5)
    assert refusal.value.retry_after_s is not None
    assert isinstance(refusal.value, PoolError)


def served_of_two(declared: int, *, places: int = 16, seconds: float = 1000.0) -> Counter[str]:
    """Requests that each tenant has ended, of which each takes 10 s and makes 10 tokens. Both have always some waiting;
    "greedy" declares that it may make `declared`, "modest" 16.
    """
    limits = {"max_waiting_per_replica": 0, "max_queued_tokens": 10**12, "max_queue_wait_s": 1e9}
    pool = dispatcher(BackendSpec(id="a", max_num_seqs=places), **limits)
    running: list[tuple[float, int, InFlightRequest]] = []
    served: Counter[str] = Counter()
    order, now_s = count(), 1.0
    waiting = Counter({"greedy": 0, "modest": 0})

    def begin(sent: InFlightRequest) -> None:
        heapq.heappush(running, (now_s + 10.0, next(order), sent))

    while now_s < seconds:
        for tenant, tokens in (("greedy", declared), ("modest", 16)):
            if tenant == "modest" and now_s < 50.0:  # it comes when the other has all places
                continue
            while waiting[tenant] < places:
                placed = pool.submit(DispatchRequest(prompt_tokens=1, output_tokens=tokens, tenant=tenant), now_s)
                if isinstance(placed, InFlightRequest):
                    begin(placed)
                else:
                    waiting[tenant] += 1
                for queued in pool.take_decided():
                    waiting[queued.request.tenant] -= 1
                    assert isinstance(queued.outcome, InFlightRequest)
                    begin(queued.outcome)
        now_s, _, ended = heapq.heappop(running)
        served[ended.request.tenant] += 1
        pool.release(ended, "ok", now_s, output_tokens=10)
        for queued in pool.take_decided():
            waiting[queued.request.tenant] -= 1
            assert isinstance(queued.outcome, InFlightRequest)
            begin(queued.outcome)
    return served


@pytest.mark.parametrize("declared", [16, 4096, 4_000_000])
def test_a_tenant_that_declares_much_and_uses_little_delays_no_other(declared: int) -> None:
    served = served_of_two(declared)
    assert served["modest"] >= 0.45 * served.total()
    assert served["greedy"] > 0


def test_a_tenant_that_fills_the_queue_leaves_others_a_share_of_it() -> None:
    pool = dispatcher(max_queued_requests=40)
    fill(pool, 3)
    for _ in range(40):
        pool.submit(request(tenant="greedy"), 1.0)
    with pytest.raises(PoolFull):
        pool.submit(request(tenant="greedy"), 1.0)
    for _ in range(10):  # half of a fair share of 20
        pool.submit(request(tenant="modest"), 1.0)
    with pytest.raises(PoolFull):
        pool.submit(request(tenant="modest"), 1.0)


def test_a_tenant_whose_requests_may_take_many_tokens_leaves_others_a_share_of_the_queue() -> None:
    pool = dispatcher(max_queued_tokens=1000)
    fill(pool, 3)
    pool.submit(request(980, tenant="greedy"), 1.0)
    with pytest.raises(PoolFull):
        pool.submit(request(tenant="greedy"), 1.0)
    for _ in range(12):  # 20 tokens each, of 250
        pool.submit(request(tenant="modest"), 1.0)
    with pytest.raises(PoolFull):
        pool.submit(request(tenant="modest"), 1.0)


def test_a_tenant_whose_requests_are_rejected_slows_nobody_else() -> None:
    """Ten a second are too large for it. Ten clients of another tenant ask again as soon as they are answered."""

    def answered(*, with_rejected: bool) -> int:
        pool = dispatcher(BackendSpec(id="a", max_num_seqs=32))
        running: list[InFlightRequest] = []
        num_waiting = num_ended = 0
        for step in range(1000):
            now_s = 1.0 + step / 100
            for sent in [one for one in running if now_s - one.sent_s >= 0.295]:
                running.remove(sent)
                pool.release(sent, "ok", now_s)
                num_ended += 1
            for tenant in ["good"] * (10 - len(running) - num_waiting) + ["bad"] * (with_rejected and step % 10 == 0):
                placed = pool.submit(request(tenant=tenant), now_s)
                if isinstance(placed, InFlightRequest):
                    running.append(placed)
                num_waiting += isinstance(placed, QueuedRequest) and tenant == "good"
            while decided := [one.outcome for one in pool.take_decided()]:
                running += [one for one in decided if isinstance(one, InFlightRequest)]
                num_waiting -= sum(one.request.tenant == "good" for one in decided if isinstance(one, InFlightRequest))
            for sent in [one for one in running if one.tenant == "bad"]:
                running.remove(sent)
                pool.release(sent, "rejected", now_s)
            pool.tick(now_s)
        return num_ended

    assert answered(with_rejected=True) >= 0.95 * answered(with_rejected=False) > 300


def test_without_retry_after_a_rejection_lowers_the_limit_to_what_the_backend_runs_or_has_just_accepted() -> None:
    pool = dispatcher(BackendSpec(id="a", max_num_seqs=32))
    (backend,) = pool.backends
    first, second, third = fill(pool, 3)
    pool.release(third, "rejected", 1.0)
    assert backend.limit == 2
    pool.first_token(second, 1.0)
    pool.release(second, "failed", 1.5)
    pool.release(first, "rejected", 2.0)
    assert backend.limit == 2, "it accepted one beside another a second ago"
    sent = pool.submit(request(), 20.0)
    assert isinstance(sent, InFlightRequest)
    pool.release(sent, "rejected", 20.0)
    assert backend.limit == 1, "that was long ago"


def test_a_retry_after_a_crash_goes_to_a_backend_that_has_shown_life_since() -> None:
    pool = dispatcher(BackendSpec(id="a"), BackendSpec(id="b"))
    b = next(one for one in pool.backends if one.id == "b")
    queued = pool.submit(request(num_crashes=1, crashed_s=1.0), 1.0, avoid=("a",))
    assert isinstance(queued, QueuedRequest)
    b.received(1.5)
    pool.tick(1.5)
    assert isinstance(queued.outcome, InFlightRequest)
    assert queued.outcome.backend is b


def test_requests_in_quarantine_start_one_after_another_while_others_run() -> None:
    pool = dispatcher(BackendSpec(id="a"))
    suspects = [pool.submit(request(num_crashes=2, stream=True), 1.0) for _ in range(3)]
    first, second, third = suspects
    assert isinstance(first, InFlightRequest)
    assert isinstance(second, QueuedRequest)
    pool.first_token(first, 2.0)
    pool.tick(2.0)
    assert isinstance(second.outcome, InFlightRequest)
    assert isinstance(third, QueuedRequest)
    assert third.outcome is None
    pool.release(second.outcome, "failed", 3.0)
    assert isinstance(third.outcome, InFlightRequest)


def test_new_requests_do_not_wait_for_those_in_quarantine() -> None:
    pool = dispatcher(BackendSpec(id="a"))
    pool.submit(request(num_crashes=2), 1.0)
    pool.submit(request(num_crashes=2), 1.0)
    new = pool.submit(request(), 1.0)
    assert isinstance(new, InFlightRequest) or isinstance(new.outcome, InFlightRequest)


@pytest.mark.parametrize("num_beside", [0, 1])
def test_a_request_that_fails_was_alone_unless_others_ran_or_failed_beside_it(num_beside: int) -> None:
    pool = dispatcher(BackendSpec(id="a"))
    sent = [
        one for one in (pool.submit(request(), 1.0) for _ in range(1 + num_beside)) if isinstance(one, InFlightRequest)
    ]
    for one in sent:
        pool.release(one, "failed", 2.0)
    assert [one.was_alone for one in sent] == [not num_beside] * len(sent)


def refused_after(slow_s: float | None, *, declared_tokens: int = 1) -> int:
    """How many of 200 requests of 1 s, 40 at once every 10 s, are refused at a backend that runs 8.

    slow_s: what 40 requests of another tenant took before, the last of which ended 50 s earlier.
    """
    pool = dispatcher(BackendSpec(id="a", max_num_seqs=6))
    events: list[tuple[float, int, object]] = []
    order, refused = count(), 0
    for i in range(40 if slow_s else 0):
        heapq.heappush(
            events,
            ((slow_s or 0.0) * (i // 8), next(order), DispatchRequest(tenant="slow", output_tokens=declared_tokens)),
        )
    for i in range(200):
        at_s = 5 * (slow_s or 0.0) + 50.0 + 10.0 * (i // 40)
        heapq.heappush(events, (at_s, next(order), DispatchRequest(tenant="quick", output_tokens=2000)))

    def start(sent: InFlightRequest, now_s: float) -> None:
        pool.first_token(sent, now_s)
        seconds = (slow_s or 0.0) if sent.tenant == "slow" else 1.0
        heapq.heappush(events, (now_s + seconds, next(order), sent))

    while events:
        deadline_s = pool.next_deadline()
        now_s = events[0][0] if deadline_s is None else min(events[0][0], deadline_s)
        if now_s < events[0][0]:
            pool.tick(now_s)
        else:
            event = heapq.heappop(events)[2]
            if isinstance(event, InFlightRequest):
                pool.release(event, "ok", now_s, output_tokens=1)
            else:
                assert isinstance(event, DispatchRequest)
                try:
                    placed = pool.submit(event, now_s)
                except PoolError:
                    refused += 1
                else:
                    if isinstance(placed, InFlightRequest):
                        start(placed, now_s)
        for queued in pool.take_decided():
            if isinstance(queued.outcome, InFlightRequest):
                start(queued.outcome, now_s)
            else:
                refused += 1
    return refused


@pytest.mark.parametrize("declared_tokens", [1, 2000])
def test_what_one_tenants_slow_requests_took_refuses_no_other_tenants(declared_tokens: int) -> None:
    assert refused_after(None) == 0
    assert refused_after(50.0, declared_tokens=declared_tokens) == 0


def test_a_slow_first_token_of_one_tenant_makes_no_others_deadline_infeasible() -> None:
    pool = dispatcher(BackendSpec(id="a", max_num_seqs=1))
    for _ in range(10):
        slow = pool.submit(request(tenant="slow"), 1.0)
        assert isinstance(slow, InFlightRequest)
        pool.first_token(slow, 31.0)
        pool.release(slow, "cancelled", 31.0)
    for _ in range(3):
        pool.submit(request(tenant="slow"), 31.0)
    quick = pool.submit(request(tenant="quick", deadline_s=41.0), 31.0)
    assert isinstance(quick, QueuedRequest)
