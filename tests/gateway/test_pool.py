"""A pool gives places to requests, one by one: who gets which, who waits, who is refused, and what happens between."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from pool_world import make_pool, make_ready, replica, request, settle

from powerband.dispatch.errors import DeadlineUnreachable, NoReplicaAvailable, PoolFull, QueueTimeout, ReplicasBusy
from powerband.gateway.dispatch.pool import Lease, Pool
from powerband.gateway.routes import ModelRoute
from virtual_loop import VirtualLoop, virtually


async def fill(pool: Pool, count: int) -> list[Lease]:
    return [await pool.lease(request(f"fill{i}", tenant="filler")) for i in range(count)]


def test_requests_go_where_least_is_outstanding() -> None:
    async def test(loop: VirtualLoop) -> None:
        pool = make_pool(loop, replica("a"), replica("b"))
        first = await pool.lease(request(output_tokens=500))
        others = [await pool.lease(request()) for _ in range(3)]
        assert first.replica.id == "a"
        assert {lease.replica.id for lease in others} == {"b"}

    virtually(test)


def test_a_place_that_becomes_free_goes_to_who_waits() -> None:
    async def test(loop: VirtualLoop) -> None:
        pool = make_pool(loop, replica("a", 1))
        leases = await fill(pool, 3)  # one running, two waiting there
        waiting = asyncio.ensure_future(pool.lease(request()))
        await asyncio.sleep(2)
        assert not waiting.done()
        assert pool.snapshot().queued == 1
        leases[0].close("ok", output_tokens=10)
        lease = await waiting
        assert lease.queue_s == pytest.approx(2, abs=0.01)
        assert pool.snapshot().queued == 0

    virtually(test)


def test_a_new_replica_takes_from_those_already_queued() -> None:
    async def test(loop: VirtualLoop) -> None:
        pool = make_pool(loop, replica("a", 1))
        await fill(pool, 3)
        waiting = [asyncio.ensure_future(pool.lease(request())) for _ in range(3)]
        await settle()
        pool.update(ModelRoute(name="m", replicas=(replica("a", 1), replica("b", 1))))
        await settle()
        assert not any(task.done() for task in waiting)
        make_ready(pool, "b")
        assert {lease.replica.id for lease in await asyncio.gather(*waiting)} == {"b"}

    virtually(test)


def test_a_cancelled_request_leaves_the_queue_at_once() -> None:
    async def test(loop: VirtualLoop) -> None:
        pool = make_pool(loop, replica("a", 1))
        leases = await fill(pool, 3)
        waiting = asyncio.ensure_future(pool.lease(request()))
        await settle()
        waiting.cancel()
        await settle()
        assert pool.snapshot().queued == 0
        leases[0].close("ok")
        await pool.lease(request())  # the place is free

    virtually(test)


def test_a_request_cancelled_in_the_moment_it_gets_its_place_gives_it_back() -> None:
    async def test(loop: VirtualLoop) -> None:
        pool = make_pool(loop, replica("a", 1))
        leases = await fill(pool, 3)
        waiting = asyncio.ensure_future(pool.lease(request()))
        await settle()
        leases[0].close("ok")  # its future is done now …
        waiting.cancel()  # … and it never hears of it
        await settle()
        assert waiting.cancelled()
        assert pool.snapshot().replicas[0].inflight == 2

    virtually(test)


def test_the_queue_is_bounded_in_requests_and_tokens() -> None:
    async def test(loop: VirtualLoop) -> None:
        pool = make_pool(loop, replica("a", 1), max_queued_requests=2, max_queued_tokens=100)
        await fill(pool, 3)
        tasks = [asyncio.ensure_future(pool.lease(request(prompt_tokens=80)))]
        await settle()
        with pytest.raises(PoolFull, match=r"90 tokens are waiting .* limit is 100") as refusal:
            await pool.lease(request(prompt_tokens=11))
        assert (refusal.value.http_status, refusal.value.code) == (503, "pool_full")
        assert refusal.value.retry_after_s is not None
        tasks.append(asyncio.ensure_future(pool.lease(request(prompt_tokens=0))))
        await settle()
        with pytest.raises(PoolFull, match="requests waiting: 2; the limit is 2"):
            await pool.lease(request(prompt_tokens=0, output_tokens=0))
        for task in tasks:
            task.cancel()

    virtually(test)


def test_nobody_waits_longer_than_the_longest_wait() -> None:
    async def test(loop: VirtualLoop) -> None:
        pool = make_pool(loop, replica("a", 1), max_queue_wait_s=7.0)
        await fill(pool, 3)
        started_s = loop.time()
        with pytest.raises(QueueTimeout, match=r"within 7\.0 s"):
            await pool.lease(request())
        assert loop.time() - started_s == pytest.approx(7.0, abs=0.01)

    virtually(test)


def test_a_deadline_out_of_reach_is_refused_at_once() -> None:
    async def test(loop: VirtualLoop) -> None:
        pool = make_pool(loop, replica("a", 1))
        pool.update(ModelRoute(name="m", replicas=(replica("a", 1),), rate=1.0))
        await fill(pool, 3)
        waiting = [asyncio.ensure_future(pool.lease(request())) for _ in range(5)]
        await settle()
        with pytest.raises(DeadlineUnreachable) as refusal:  # six seconds, at one a second
            await pool.lease(request(deadline_s=loop.time() + 4.5))
        assert refusal.value.http_status == 503
        accepted = asyncio.ensure_future(pool.lease(request(deadline_s=loop.time() + 8.0)))
        with pytest.raises(QueueTimeout):
            await accepted
        for task in waiting:
            task.cancel()

    virtually(test)


def test_without_replicas_requests_are_refused() -> None:
    async def test(loop: VirtualLoop) -> None:
        pool = make_pool(loop)
        with pytest.raises(NoReplicaAvailable):
            await pool.lease(request())
        pool.update(ModelRoute(name="m", replicas=(replica("a"),)))
        waiting = asyncio.ensure_future(pool.lease(request()))  # it is starting
        await asyncio.sleep(5)
        make_ready(pool)
        assert (await waiting).replica.id == "a"

    virtually(test)


def test_a_second_attempt_goes_first_and_elsewhere() -> None:
    async def test(loop: VirtualLoop) -> None:
        pool = make_pool(loop, replica("a", 1), replica("b", 1))
        leases = await fill(pool, 6)
        first = asyncio.ensure_future(pool.lease(request("new")))
        await settle()
        failed = leases[0]
        again = asyncio.ensure_future(pool.lease(request("again"), avoid=(failed.replica.id,)))
        await settle()
        failed.close("failed")
        assert (await first).replica.id == failed.replica.id
        other = next(lease for lease in leases if lease.replica.id != failed.replica.id)
        other.close("ok")
        assert (await again).replica.id == other.replica.id

    virtually(test)


def test_a_replica_at_another_url_is_another_process() -> None:
    async def test(loop: VirtualLoop) -> None:
        pool = make_pool(loop, replica("a", 8))
        (await pool.lease(request())).close("rejected")  # it takes no more than it has: nothing
        assert pool.backends[0].limit == 1
        pool.update(ModelRoute(name="m", replicas=(replica("a", 8),)))
        assert pool.backends[0].limit == 1
        pool.update(ModelRoute(name="m", replicas=(replace(replica("a", 8), url="http://elsewhere:1"),)))
        assert pool.backends[0].limit == 10

    virtually(test)


# ---- replicas that ask for a pause (Retry-After)


def test_a_replica_that_asks_for_an_hour_is_tried_again_soon_by_one_request() -> None:
    async def test(loop: VirtualLoop) -> None:
        pool = make_pool(loop, replica("a", 8))
        (await pool.lease(request())).close("rejected", retry_after_s=3600.0)
        start_s = loop.time()
        waiting = [asyncio.ensure_future(pool.lease(request(str(i)))) for i in range(10)]
        pauses_s = []
        for _ in range(3):
            done, _pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            assert len(done) == 1, "one at a time"
            pauses_s.append(round(loop.time() - start_s, 1))
            start_s = loop.time()
            waiting = [one for one in waiting if one not in done]
            done.pop().result().close("rejected", retry_after_s=3600.0)
        assert pauses_s == pytest.approx([1, 2, 4], abs=0.1)
        await asyncio.sleep(0.1)
        for one in waiting:  # the next pause is longer than a request waits
            with pytest.raises(ReplicasBusy) as refusal:
                await one
            assert refusal.value.retry_after_s == pytest.approx(8, abs=0.2)
        with pytest.raises(ReplicasBusy):
            await pool.lease(request())

    virtually(test)


def test_a_pause_is_no_longer_than_the_replica_asks_for_and_ends_with_the_first_that_it_takes() -> None:
    async def test(loop: VirtualLoop) -> None:
        pool = make_pool(loop, replica("a", 8))
        for _ in range(4):
            (await pool.lease(request())).close("rejected", retry_after_s=1.0)
        start_s = loop.time()
        trial = await pool.lease(request())
        assert loop.time() - start_s == pytest.approx(1, abs=0.1)
        others = [asyncio.ensure_future(pool.lease(request(str(i)))) for i in range(3)]
        await settle()
        assert not any(one.done() for one in others)
        trial.first_token()
        await asyncio.sleep(0.1)
        assert all(one.done() for one in others)

    virtually(test)


def test_a_whole_answer_that_is_not_refused_at_once_is_taken() -> None:
    async def test(loop: VirtualLoop) -> None:
        pool = make_pool(loop, replica("a", 8))
        (await pool.lease(request())).close("rejected", retry_after_s=60.0)
        start_s = loop.time()
        await asyncio.gather(*(pool.lease(request(str(i), stream=False)) for i in range(8)))
        assert loop.time() - start_s == pytest.approx(2, abs=0.2)

    virtually(test)


def test_a_tenant_that_is_refused_while_others_are_answered_pauses_the_replica_for_no_one() -> None:
    async def test(loop: VirtualLoop) -> None:
        pool = make_pool(loop, replica("a", 8))
        (await pool.lease(request(tenant="x"))).close("rejected", retry_after_s=3600.0)
        (await pool.lease(request(tenant="y"))).close("ok")
        for _ in range(20):
            (await pool.lease(request(tenant="x"))).close("rejected", retry_after_s=3600.0)
            start_s = loop.time()
            (await pool.lease(request(tenant="y"))).close("ok")
            assert loop.time() == start_s

    virtually(test)
