"""Who is next: shares between tenants, order between priorities, and what is ahead of a new request."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from pool_world import make_pool, replica, request, settle

from powerband.dispatch.backend import BackendSpec
from powerband.dispatch.capacity import Capacity
from powerband.dispatch.dispatcher import Dispatcher
from powerband.dispatch.errors import PoolFull
from powerband.dispatch.options import DispatchOptions
from powerband.dispatch.queue import FairQueue, QueuedRequest
from virtual_loop import VirtualLoop, virtually


def ticket(tenant: str, tokens: int = 10, priority: int = 0) -> QueuedRequest:
    return QueuedRequest(request(tenant=tenant), tokens, (1, priority), 0.0)


def take(queue: FairQueue) -> QueuedRequest | None:
    return queue.pop(lambda tickets: next(iter(tickets)))


def test_a_thousand_requests_of_one_tenant_do_not_delay_another_s_first() -> None:
    queue = FairQueue()
    for _ in range(1000):
        queue.push(ticket("many"))
    for _ in range(100):
        take(queue)
    queue.push(ticket("few"))
    next_two = [taken.request.tenant for taken in (take(queue), take(queue)) if taken]
    assert "few" in next_two


def test_shares_are_of_tokens_not_of_requests() -> None:
    queue = FairQueue()
    for _ in range(300):
        queue.push(ticket("long", 100))
        queue.push(ticket("short", 20))
    served: Counter[str] = Counter()
    for _ in range(300):
        if taken := take(queue):
            served[taken.request.tenant] += taken.tokens
    assert abs(served["long"] - served["short"]) <= 100


def test_what_was_not_used_is_given_back() -> None:
    queue = FairQueue()
    for _ in range(100):
        queue.push(ticket("claims", 1000))
        queue.push(ticket("uses", 100))
    served: Counter[str] = Counter()
    for _ in range(100):
        if taken := take(queue):
            served[taken.request.tenant] += 1
            queue.settle(taken.level, taken.request.tenant, taken.tokens, 100)  # both take 100
    assert abs(served["claims"] - served["uses"]) <= 2


def test_idleness_saves_nothing_up() -> None:
    queue = FairQueue()
    for _ in range(500):
        queue.charge((1, 0), "busy", 10)
        queue.settle((1, 0), "busy", 10, 10)
    queue.push(ticket("idle"))
    take(queue)
    for _ in range(10):
        queue.push(ticket("idle"))
        queue.push(ticket("busy"))
    served = Counter(taken.request.tenant for taken in (take(queue) for _ in range(10)) if taken)
    assert abs(served["idle"] - served["busy"]) <= 2


def test_lower_priorities_go_first_and_no_tenant_of_a_class_starves() -> None:
    queue = FairQueue()
    for i in range(30):
        queue.push(ticket(f"t{i % 3}", priority=5))
        queue.push(ticket("urgent", priority=-1))
    order = [taken.request.tenant for taken in (take(queue) for _ in range(60)) if taken]
    assert set(order[:30]) == {"urgent"}
    assert all(set(order[i : i + 3]) == {"t0", "t1", "t2"} for i in range(30, 60, 3))


def test_what_is_ahead_is_what_is_served_before() -> None:
    queue = FairQueue()
    for _ in range(50):
        queue.push(ticket("many"))
        queue.push(ticket("urgent", priority=-1))
    assert queue.tokens_ahead((1, 0), "many") == 1000
    assert queue.tokens_ahead((1, 0), "new") == 500
    assert queue.tokens_ahead((1, -1), "urgent") == 500
    assert queue.tokens_ahead((0, 0), "again") == 0


def test_a_tenant_that_floods_waits_longer_and_nobody_else_does() -> None:
    """Through the pool: one place, a second for each request; the flood is refused when its own wait is too long."""

    async def test(loop: VirtualLoop) -> None:
        pool = make_pool(loop, replica("a", 1), max_queue_wait_s=30.0)
        waits: dict[str, list[float]] = {"flood": [], "calm": []}

        async def one(tenant: str) -> None:
            lease = await pool.lease(request(tenant=tenant))
            waits[tenant].append(lease.queue_s)
            await asyncio.sleep(3.0)  # three at once: one a second
            lease.close("ok", output_tokens=10)

        async def calm() -> None:
            for _ in range(20):
                await asyncio.sleep(4)
                await one("calm")

        tasks = [asyncio.ensure_future(one("flood")) for _ in range(1000)]
        await asyncio.wait_for(calm(), 400)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert max(waits["calm"]) < 3.0
        assert max(waits["flood"]) > 20.0

    virtually(test)


def test_predictions_come_true() -> None:
    """Two places of two seconds: what is predicted when a request comes is what it then waits, within a few seconds."""

    async def test(loop: VirtualLoop) -> None:
        pool = make_pool(loop, replica("a", 2), max_waiting_per_replica=0, max_queue_wait_s=100.0)
        errors = []

        async def one(i: int) -> None:
            predicted_s = pool.snapshot().predicted_wait_s
            lease = await pool.lease(request(tenant=f"t{i % 4}", output_tokens=50))
            if i > 20:
                errors.append(abs(lease.queue_s - predicted_s) / max(predicted_s, 10.0))
            await asyncio.sleep(2.0 + i % 3 - 1)
            lease.close("ok", output_tokens=25)

        tasks = []
        for i in range(120):
            tasks.append(asyncio.ensure_future(one(i)))
            await asyncio.sleep(0.6)  # a little faster than they can be served
        await asyncio.gather(*tasks)
        assert max(errors) < 0.5
        assert sum(errors) / len(errors) < 0.12

    virtually(test)


MOVES = st.lists(
    st.tuples(
        st.sampled_from(["push", "push", "pop", "remove", "charge", "settle"]), st.integers(0, 3), st.integers(1, 50)
    ),
    max_size=120,
)


@settings(max_examples=150)
@given(MOVES)
def test_nothing_is_lost_and_the_least_served_is_next(moves: list[tuple[str, int, int]]) -> None:
    queue, waiting = FairQueue(), list[QueuedRequest]()
    for move, who, tokens in moves:
        tenant, priority = f"t{who}", who % 2
        if move == "push":
            waiting.append(ticket(tenant, tokens, priority))
            queue.push(waiting[-1])
        elif move == "charge":
            queue.charge((1, priority), tenant, tokens)
        elif move == "settle":
            queue.settle((1, priority), tenant, tokens, tokens / 2)
        elif move == "remove" and waiting:
            queue.remove(waiting.pop(tokens % len(waiting)))
        elif move == "pop":
            taken = take(queue)
            assert (taken is None) == (not waiting)
            if taken is not None:
                assert taken.level == min(one.level for one in waiting)
                first = next(one for one in waiting if one.request.tenant == taken.request.tenant)
                assert first is taken
                waiting.remove(taken)
        assert queue.requests == len(waiting) == len(list(queue))
        assert queue.tokens == sum(one.tokens for one in waiting)
    while taken := take(queue):
        waiting.remove(taken)
    assert not waiting


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 100)), min_size=60, max_size=200))
def test_tenants_that_always_wait_are_served_alike(sizes: list[tuple[int, int]]) -> None:
    """Start-time fair queuing: over any stretch in which two wait, they differ by at most a request of each."""
    queue, served = FairQueue(), Counter[str]()
    pending: Counter[str] = Counter()
    for who, tokens in sizes:
        queue.push(ticket(f"t{who}", tokens))
        pending[f"t{who}"] += 1
    while pending and min(pending.values()) > 1:
        taken = take(queue)
        assert taken is not None
        tenant = taken.request.tenant
        served[tenant] += taken.tokens
        pending[tenant] -= 1
        assert max(served[t] for t in pending) - min(served[t] for t in pending) <= 200


def test_a_tenant_that_waits_at_many_priorities_counts_once() -> None:
    queue = FairQueue()
    for priority in range(5):
        queue.push(ticket("many", priority=priority))
    assert queue.share_of("other") == (0, 0, 2)
    assert queue.share_of("many") == (5, 50, 1)
    assert take(queue)
    assert queue.share_of("many") == (4, 40, 1)


def test_a_tenant_uses_eight_priorities_at_a_time_and_a_ninth_becomes_the_next_later_one() -> None:
    queue = FairQueue()
    for priority in range(10, 90, 10):
        assert queue.level_for("many", (1, priority)) == (1, priority)
        queue.push(ticket("many", priority=priority))
    asked = {5: 10, 10: 10, 11: 20, 45: 50, 80: 80, 2**31 - 1: 80}
    assert {priority: queue.level_for("many", (1, priority))[1] for priority in asked} == asked
    assert queue.level_for("many", (0, 7)) == (0, 7), "retries have levels of their own"
    assert queue.level_for("other", (1, 45)) == (1, 45)
    first = take(queue)
    assert first
    assert queue.level_for("many", (1, 45)) == (1, 50), "a request in flight still uses its level"
    queue.settle(first.level, "many", first.tokens, 10)
    assert queue.level_for("many", (1, 45)) == (1, 45)


def test_a_tenant_with_a_priority_for_each_request_locks_nobody_out() -> None:
    """And the levels that every lookup goes through stay few."""

    def queued_by_others(num_priorities: int) -> int:
        pool = Dispatcher(DispatchOptions(max_queued_requests=500, max_queued_tokens=100_000))
        pool.update([BackendSpec(id="a", max_num_seqs=1)], 0.0)
        found = 0
        for tenant in ("many", "other"):
            for number in range(1000):
                with contextlib.suppress(PoolFull):
                    pool.submit(request(tenant=tenant, priority=number % num_priorities), 0.0)
                    found += tenant == "other"
        assert max(len(one.queue._levels) for one in pool._pools) <= 64
        return found

    assert queued_by_others(1000) == queued_by_others(1) > 100


def test_memory_of_tenants_is_bounded() -> None:
    queue = FairQueue()
    for i in range(20_000):
        for priority, tenant in ((0, f"t{i}"), (i % 1000, "one")):
            queue.charge((1, priority), tenant, 10)
            queue.settle((1, priority), tenant, 10, 10)
    assert len(queue._levels) <= 64
    assert sum(len(level.tenants) for level in queue._levels.values()) < 10_000


def test_an_expired_request_leaves_nothing_behind() -> None:
    async def test(loop: VirtualLoop) -> None:
        pool = make_pool(loop, replica("a", 1), max_queue_wait_s=2.0)
        held = [await pool.lease(request()) for _ in range(3)]
        tasks = [asyncio.ensure_future(pool.lease(request())) for _ in range(50)]
        await asyncio.sleep(3)
        await settle()
        assert all(task.exception() is not None for task in tasks)
        assert (pool.snapshot().queued, pool.snapshot().queued_tokens) == (0, 0)
        held[0].close("ok")
        assert (await pool.lease(request())).queue_s == 0

    virtually(test)


def test_limits_that_nobody_comes_near_do_not_shorten_the_wait_that_is_predicted() -> None:
    """Who names max_tokens of 2³¹ and ends after a few makes usual requests look like nothing beside it."""
    capacity = Capacity()
    capacity.observe(0.0, is_saturated=True, ready=1, live=4)
    for _ in range(20):
        capacity.ended(2**31, 10.0)
    assert 100 * 10 / 4 / 8 <= (capacity.wait_s(100 * 300, 100) or 0.0) <= 100 * 10 / 4
