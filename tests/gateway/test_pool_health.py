"""Replicas that stop, hang, die, flap and come back: how soon traffic is away from them, and what becomes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from pool_world import make_pool, replica, request, settle

from powerband.dispatch.backend import ReplicaLoad
from powerband.dispatch.breaker import CircuitBreaker, RetryBudget
from powerband.dispatch.errors import QueueTimeout
from powerband.engines.registry import ADAPTERS
from powerband.gateway.dispatch.health import Prober, read_load
from powerband.gateway.dispatch.pool import Lease, Pool
from powerband.gateway.options import PoolOptions
from powerband.gateway.routes import ModelRoute, ReplicaAddress
from powerband.spec.deployment import EngineName
from virtual_loop import VirtualLoop, virtually


@dataclass
class Machine:
    """What a replica's process does. streams: leases on which tokens come while it lives."""

    state: str = "ready"  # or stopped, dead, unready
    restarts: int = 0
    metrics: str = ""
    answer_s: float = 0.0  # that a probe takes
    emits: bool = True
    streams: list[Lease] = field(default_factory=list)


class Site:
    """A pool before machines, with its prober running, and every machine's streams sending a token each 50 ms."""

    def __init__(self, loop: VirtualLoop, *replicas: ReplicaAddress, **options: object) -> None:
        self.loop = loop
        self.machines = {one.id: Machine() for one in replicas}
        self.pool = make_pool(loop, *replicas, ready=False, **options)
        self.prober = Prober(self.pool, self.fetch)
        self.tasks = [asyncio.ensure_future(self.prober.run()), asyncio.ensure_future(self.emit())]

    async def fetch(self, one: ReplicaAddress, path: str, timeout_s: float) -> tuple[int, bytes]:
        machine = self.machines[one.id]
        if machine.state == "dead":
            raise ConnectionRefusedError
        if machine.state == "stopped" or machine.answer_s > timeout_s:
            await asyncio.sleep(timeout_s)
            raise TimeoutError
        await asyncio.sleep(machine.answer_s)
        if path.endswith("metrics"):
            return 200, machine.metrics.encode()
        if machine.state == "unready":
            return 503, b"{}"
        return 200, b'{"status": "ok", "engine_restarts": %d}' % machine.restarts

    async def emit(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            for machine in self.machines.values():
                for lease in machine.streams if machine.state in ("ready", "unready") and machine.emits else ():
                    lease.progress()

    async def stream(self, count: int = 1, **more: object) -> list[Lease]:
        leases = []
        for i in range(count):
            lease = await self.pool.lease(request(f"s{i}", output_tokens=100, **more))
            lease.first_token()
            self.machines[lease.replica.id].streams.append(lease)
            leases.append(lease)
        return leases

    def state(self, name: str) -> str:
        return next(one.state for one in self.pool.snapshot().replicas if one.id == name)

    async def until(self, name: str, state: str, within_s: float) -> float:
        start_s = self.loop.time()
        while self.state(name) != state:
            assert self.loop.time() - start_s < within_s, f"{name} is still {self.state(name)}"
            await asyncio.sleep(0.01)
        return self.loop.time() - start_s


def on_site(
    test: Callable[[Site], Awaitable[None]], *replicas: ReplicaAddress, start_ready: bool = True, **options: object
) -> None:
    async def whole(loop: VirtualLoop) -> None:
        site = Site(loop, *(replicas or (replica("a", 8), replica("b", 8))), **options)
        try:
            if start_ready:
                for name in site.machines:
                    await site.until(name, "ready", 1.0)
            await test(site)
        finally:
            for task in site.tasks:
                task.cancel()
            await asyncio.gather(*site.tasks, return_exceptions=True)

    virtually(whole)


def test_a_stopped_replica_is_left_within_three_seconds_and_its_streams_are_told() -> None:
    async def test(site: Site) -> None:
        leases = await site.stream(6)
        await asyncio.sleep(1.0)
        told: list[str] = []
        for lease in leases:
            lease.when_lost(lambda lease=lease: told.append(lease.replica.id))
        site.machines["a"].state = "stopped"
        assert await site.until("a", "ejected", 3.0) < 2.1
        assert told == ["a"] * 3
        assert [lease.is_lost for lease in leases] == [lease.replica.id == "a" for lease in leases]
        assert (await site.pool.lease(request())).replica.id == "b"
        site.machines["a"].state = "ready"
        assert await site.until("a", "ready", 3.0) >= 0.5  # two good probes

    on_site(test)


def test_a_stopped_replica_without_streams_is_left_within_three_seconds() -> None:
    async def test(site: Site) -> None:
        await asyncio.sleep(0.2)
        waiting = await site.pool.lease(request())
        assert waiting.replica.id == "a"
        site.machines["a"].state = "stopped"
        assert await site.until("a", "ejected", 3.0) <= 2.1
        assert waiting.is_lost

    on_site(test)


@pytest.mark.parametrize(("stopped_s", "is_suspect"), [(0.0, True), (0.7, False)])
def test_a_request_is_suspected_of_a_hang_unless_the_replica_hung_before(stopped_s: float, is_suspect: bool) -> None:
    async def test(site: Site) -> None:
        await asyncio.sleep(2.0)
        site.machines["a"].state = "stopped"
        await asyncio.sleep(stopped_s)
        lease = await site.pool.lease(request(), avoid=("b",))
        await site.until("a", "ejected", 3.0)
        lease.close("failed")
        assert (lease.is_lost, lease.may_have_hung_replica, lease.was_alone) == (True, is_suspect, True)

    on_site(test)


def test_after_a_crash_every_replica_is_probed_at_once() -> None:
    async def test(site: Site) -> None:
        await asyncio.sleep(2.0)
        crashed_s = site.pool.record_crash()
        lease = asyncio.create_task(site.pool.lease(request(num_crashes=1, crashed_s=crashed_s), avoid=("a",)))
        await asyncio.sleep(0.15)
        assert lease.done()
        assert lease.result().replica.id == "b"

    on_site(test)


def test_a_dead_replica_is_left_within_a_second() -> None:
    async def test(site: Site) -> None:
        [lease] = await site.stream()
        site.machines[lease.replica.id].state = "dead"
        assert await site.until(lease.replica.id, "ejected", 1.2) <= 1.1
        shown = next(one for one in site.pool.snapshot().replicas if one.id == lease.replica.id)
        assert (shown.last_errors, shown.ejections) == (("ConnectionRefusedError",), 1)
        late: list[bool] = []
        lease.when_lost(lambda: late.append(True))
        assert late == [True], "who asks later is told at once"

    on_site(test)


def test_slow_probes_are_no_fault_while_tokens_come() -> None:
    async def test(site: Site) -> None:
        await site.stream(4)
        site.machines["a"].answer_s = 1.5
        await asyncio.sleep(20)
        assert site.state("a") == "ready"

    on_site(test)


def test_an_unready_replica_ends_what_it_has() -> None:
    async def test(site: Site) -> None:
        leases = await site.stream(2)
        site.machines["a"].state = "unready"
        await site.until("a", "ejected", 1.5)
        await asyncio.sleep(5)
        assert not any(lease.is_lost for lease in leases)

    on_site(test)


def test_an_unready_replica_from_which_nothing_comes_is_given_up() -> None:
    async def test(site: Site) -> None:
        [lease] = await site.stream()
        machine = site.machines[lease.replica.id]
        machine.state, machine.emits = "unready", False
        await asyncio.sleep(4)
        assert not lease.is_lost
        await asyncio.sleep(2)
        assert lease.is_lost

    on_site(test)


def test_another_engine_that_hangs_though_it_answers_probes_is_noticed() -> None:
    async def test(site: Site) -> None:
        leases = await site.stream(2)
        site.machines["v"].emits = False
        await asyncio.sleep(6)
        hung = next(lease for lease in leases if lease.replica.id == "v")
        assert hung.is_lost
        assert site.state("v") == "open"
        hung.close("failed")
        assert (await site.pool.lease(request())).replica.id == "b"

    on_site(test, replica("v", engine="vllm"), replica("b"))


def test_another_engine_that_computes_a_long_prompt_keeps_its_streams() -> None:
    """llama.cpp, and others that compute prompts first and have no metrics: nothing comes on any stream meanwhile."""

    async def test(site: Site) -> None:
        leases = await site.stream(4)
        site.machines["v"].emits = False
        prompts = [await site.pool.lease(request(f"p{i}", prompt_tokens=1000)) for i in range(2)]
        assert {lease.replica.id for lease in prompts} == {"v", "b"}
        await asyncio.sleep(5 + 1000 / 50 - 1)
        assert site.state("v") == "ready"
        assert not any(lease.is_lost for lease in leases)
        await asyncio.sleep(2)
        assert site.state("v") == "open", "no prompt takes so long"

    on_site(test, replica("v", engine="llamacpp"), replica("b"))


def test_streams_that_their_clients_do_not_read_say_nothing_of_the_replica() -> None:
    async def test(site: Site) -> None:
        unread = await site.stream(4)
        others = [await site.pool.lease(request(stream=False)) for _ in range(2)]
        for lease in unread:
            site.machines[lease.replica.id].emits = False
            lease.paused()
        await asyncio.sleep(60)
        assert not any(lease.is_lost for lease in (*unread, *others))
        for lease in unread:
            lease.resumed()
        await asyncio.sleep(4.9)
        assert not any(lease.is_lost for lease in unread), "silence begins when they are read"
        await asyncio.sleep(1)
        assert site.state("v") == "open"

    on_site(test, replica("v", engine="sglang"), replica("b", engine="sglang"))


def test_an_unread_stream_does_not_hide_that_a_replica_hangs() -> None:
    async def test(site: Site) -> None:
        leases = [lease for lease in await site.stream(4) if lease.replica.id == "v"]
        site.machines["v"].emits = False
        for _ in range(47):
            leases[0].paused()
            await asyncio.sleep(0.05)
            leases[0].resumed()
            await asyncio.sleep(0.05)
        assert site.state("v") == "ready"
        await asyncio.sleep(0.5)
        leases[0].paused()
        await site.until("v", "open", 2)

    on_site(test, replica("v", engine="sglang"), replica("b", engine="sglang"))


def test_comments_are_a_sign_of_life() -> None:
    """Of proxies, while a model thinks."""

    async def test(site: Site) -> None:
        lease = next(one for one in await site.stream(2) if one.replica.id == "v")
        site.machines["v"].emits = False
        for _ in range(20):
            lease.received()
            await asyncio.sleep(1)
        assert not lease.is_lost

    on_site(test, replica("v", engine="sglang"), replica("b", engine="sglang"))


def test_streams_of_the_only_replica_are_not_cut_because_it_is_silent() -> None:
    async def test(site: Site) -> None:
        leases = await site.stream(2)
        site.machines["v"].emits = False
        await asyncio.sleep(20)
        assert not any(lease.is_lost for lease in leases)

    on_site(test, replica("v", engine="sglang"))


def test_another_engine_that_still_counts_tokens_does_not_hang() -> None:
    async def test(site: Site) -> None:
        lease = next(one for one in await site.stream(2) if one.replica.id == "v")
        machine = site.machines["v"]
        machine.emits = False
        for tokens in range(20):  # it computes a long prompt
            machine.metrics = f'vllm:prompt_tokens_total{{model_name="m"}} {tokens}\n'
            await asyncio.sleep(1)
        assert not lease.is_lost

    on_site(test, replica("v", engine="vllm"), replica("b"))


def test_flapping_does_not_flap_the_pool() -> None:
    async def test(site: Site) -> None:
        changes, last = 0, "ready"
        for step in range(1800):  # three minutes of a second and a half up, and as long down
            site.machines["a"].state = "unready" if step // 15 % 2 else "ready"
            await asyncio.sleep(0.1)
            changes, last = changes + (site.state("a") != last), site.state("a")
        assert 4 < changes <= 18

    on_site(test)


def test_when_this_process_was_held_up_nobody_else_is_to_blame() -> None:
    async def test(site: Site) -> None:
        for machine in site.machines.values():
            machine.answer_s = 0.3
        for _ in range(10):
            await asyncio.sleep(0.7)
            site.loop.now_s += 3.0  # nothing ran in this time
            await settle()
            assert site.state("a") == site.state("b") == "ready"

    on_site(test)


def test_streams_survive_that_this_process_was_held_up() -> None:
    async def test(site: Site) -> None:
        leases = await site.stream(4)
        for _ in range(5):
            await asyncio.sleep(2)
            site.loop.now_s += 10.0
            site.prober.step()  # before anything that came meanwhile is read
        assert not any(lease.is_lost for lease in leases)

    on_site(test, replica("v", engine="vllm"), replica("b", engine="vllm"))


def test_a_restarted_engine_has_lost_its_cache() -> None:
    async def test(site: Site) -> None:
        keys = (b"1", b"2")
        first = await site.pool.lease(request(prefix_keys=keys))
        first.close("ok")
        again = [await site.pool.lease(request(prefix_keys=keys)) for _ in range(2)]
        assert {lease.replica.id for lease in again} == {first.replica.id}
        for lease in again:
            lease.close("ok")
        site.machines[first.replica.id].restarts = 1
        await asyncio.sleep(1)
        assert (await site.pool.lease(request(prefix_keys=keys))).replica.id != first.replica.id

    on_site(test, replica("a", 64), replica("b", 64))


@pytest.mark.parametrize("engine", ["powerband", "vllm"])
def test_a_replica_that_restarts_again_and_again_is_ejected_for_its_failures(engine: EngineName) -> None:
    async def test(site: Site) -> None:
        machine, tries = site.machines["a"], 0
        for number in range(120):
            machine.restarts = number
            machine.metrics = f'vllm:prompt_tokens_total{{model_name="m"}} {1000 - number}\n'
            lease = await site.pool.lease(request(stream=False))
            tries += lease.replica.id == "a"
            lease.close("failed" if lease.replica.id == "a" else "ok")
            await asyncio.sleep(0.5)
        assert tries <= 20, "60 s, in which its breaker opens for 1, 2, 4, 8, … s"

    on_site(test, replica("a", engine=engine), replica("b", engine=engine))


def test_fewer_are_sent_where_more_than_two_wait_and_again_more_when_none_does() -> None:
    async def test(site: Site) -> None:
        machine = site.machines["a"]
        leases = await site.stream(10)
        waiting = [asyncio.ensure_future(site.pool.lease(request())) for _ in range(10)]
        machine.metrics = page(running=4, waiting=6)
        await asyncio.sleep(2.5)
        for lease in leases[:5]:
            lease.close("ok")
        await settle()
        assert site.pool.snapshot().replicas[0].inflight == 6  # four run, two wait
        assert site.pool.snapshot().replicas[0].waiting == 6
        machine.metrics = page(running=6, waiting=0)
        await asyncio.sleep(10)
        assert site.pool.snapshot().replicas[0].inflight == 10
        for task in waiting:
            task.cancel()

    on_site(test, replica("a", 8))


def page(running: int, waiting: int) -> str:
    return f'powerband_requests_running{{e="0"}} {running}.0\npowerband_requests_waiting{{e="0"}} {waiting}.0\n'


def test_metrics_pages_are_read_by_each_engine_s_names() -> None:
    text = b"""# HELP vllm:num_requests_running Requests
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 7.0
vllm:num_requests_waiting{engine="0",model_name="m}{"} 4.0 1700000000
vllm:kv_cache_usage_perc{engine="0"} 0.5
vllm:generation_tokens_total{engine="0"} 1e+06
vllm:prompt_tokens_total NaN"""
    assert read_load(text, ADAPTERS["vllm"]) == ReplicaLoad(running=5, waiting=4, kv_usage=0.5, tokens=1e6)
    assert read_load(b"sglang:num_queue_reqs 2\n", ADAPTERS["sglang"]) == ReplicaLoad(waiting=2)
    for garbage in (b"", b"\n\n", b"vllm:num_requests_running", b"vllm:num_requests_running{ x\n", b"\xff" * 100):
        assert read_load(garbage, ADAPTERS["vllm"]) == ReplicaLoad()


def test_our_own_metrics_are_read() -> None:
    from powerband.metrics.prometheus import EngineMetrics

    metrics = EngineMetrics("m")
    cache = {"num_used": 1, "num_blocks": 4}
    zeros = dict.fromkeys(("num_preemptions", "prefix_queries", "prefix_hits"), 0)
    metrics.update({"num_running": 5, "num_waiting": 2, "cache": cache, **zeros})
    metrics.observe_tokens(7, gap_s=0.1)
    for engine in ("powerband", "vllm"):
        found = read_load(metrics.render(), ADAPTERS[engine])  # type: ignore[index]  # names of engines
        assert found == ReplicaLoad(running=5, waiting=2, kv_usage=0.25, tokens=7)


# The breaker, and the budget of second attempts.


def fail(breaker: CircuitBreaker, now_s: float, times: int = 1, *, may_open: bool = True) -> None:
    for _ in range(times):
        breaker.ended(now_s, False, is_trial=breaker.sent(), may_open=may_open)


def test_a_breaker_opens_longer_each_time_and_tries_one_request() -> None:
    breaker = CircuitBreaker(PoolOptions())
    fail(breaker, 100.0, 2)
    assert breaker.is_closed
    fail(breaker, 100.0)
    lasted = []
    now_s = 100.0
    for _ in range(6):
        assert not breaker.allows(now_s)
        lasted.append(breaker.open_until_s - now_s)
        now_s = breaker.open_until_s
        assert breaker.allows(now_s)
        assert breaker.sent()
        assert not breaker.allows(now_s), "one at a time"
        breaker.ended(now_s, False, is_trial=True, may_open=True)
    assert lasted == [5, 10, 20, 40, 60, 60]
    now_s = breaker.open_until_s
    breaker.ended(now_s, True, is_trial=breaker.sent(), may_open=True)
    assert breaker.is_closed
    fail(breaker, now_s + 200, 3)
    assert breaker.open_until_s == now_s + 205, "after a good while it begins anew"


def test_a_breaker_opens_when_half_of_the_requests_fail() -> None:
    breaker = CircuitBreaker(PoolOptions())
    for i in range(9):
        breaker.ended(100.0 + i / 10, bool(i % 2), is_trial=False, may_open=True)
    assert breaker.is_closed
    fail(breaker, 101.0)
    assert not breaker.is_closed


def test_a_client_that_leaves_says_nothing_of_the_replica() -> None:
    breaker = CircuitBreaker(PoolOptions())
    fail(breaker, 100.0, 3)
    is_trial = breaker.sent()
    breaker.ended(106.0, None, is_trial=is_trial, may_open=True)
    assert not breaker.is_closed
    assert breaker.allows(106.0), "another one may try"


@pytest.mark.parametrize(("count", "most"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_at_most_half_are_out_for_their_failures(count: int, most: int) -> None:
    async def test(loop: VirtualLoop) -> None:
        from pool_world import make_ready

        pool = make_pool(loop, *(replica(f"r{i}", 50) for i in range(count)))
        make_ready(pool)
        for lease in [await pool.lease(request()) for _ in range(count * 10)]:
            lease.close("failed")
        assert [one.state for one in pool.snapshot().replicas].count("open") == most

    virtually(test)


def test_second_attempts_are_a_share_of_what_is_live() -> None:
    budget = RetryBudget(PoolOptions())
    assert sum(budget.take(100.0, live=0) for _ in range(50)) == 10
    assert sum(budget.take(100.0, live=300) for _ in range(500)) == 50
    assert sum(budget.take(111.0, live=300) for _ in range(500)) == 60


def test_the_victims_of_a_dead_replica_are_not_counted() -> None:
    async def test(site: Site) -> None:
        pool: Pool = site.pool
        leases = [await pool.lease(request()) for _ in range(120)]
        victims = [lease for lease in leases if lease.replica.id == "a"]
        assert len(victims) == 60
        site.machines["a"].state = "dead"
        for lease in victims:  # at once: no probe has seen it yet
            lease.close("failed")
            assert pool.may_retry(lease)
            assert (await pool.lease(request(), avoid=("a",))).replica.id == "b"

    on_site(test, replica("a", 200), replica("b", 200))


def test_a_replica_that_a_request_finds_absent_gets_nothing_until_its_probes_are_good() -> None:
    async def test(site: Site) -> None:
        lease = await site.pool.lease(request())
        gone = lease.replica.id
        site.machines[gone].state = "dead"
        lease.close("unavailable")
        assert site.state(gone) == "ejected"
        assert {(await site.pool.lease(request())).replica.id for _ in range(8)} == {"a", "b"} - {gone}
        site.machines[gone].state = "ready"
        await site.until(gone, "ready", 2.0)

    on_site(test)


def test_where_all_are_absent_a_request_waits_for_the_first_that_is_back() -> None:
    async def test(site: Site) -> None:
        for machine in site.machines.values():
            machine.state = "dead"
        for _ in range(2):
            (await site.pool.lease(request())).close("unavailable")
        waiting = asyncio.create_task(site.pool.lease(request(), avoid=("a", "b")))
        await asyncio.sleep(3)
        assert not waiting.done()
        site.machines["b"].state = "ready"
        assert (await waiting).replica.id == "b"

    on_site(test)


def test_where_all_are_absent_a_request_waits_no_longer_than_its_deadline() -> None:
    async def test(site: Site) -> None:
        for machine in site.machines.values():
            machine.state = "dead"
        for _ in range(2):
            (await site.pool.lease(request())).close("unavailable")
        began_s = site.loop.time()
        with pytest.raises(QueueTimeout):
            await site.pool.lease(request(deadline_s=began_s + 2.0), avoid=("a",))
        assert site.loop.time() - began_s == pytest.approx(2.0, abs=0.1)

    on_site(test)


def test_a_replica_that_is_left_out_keeps_its_streams() -> None:
    async def test(site: Site) -> None:
        [lease] = await site.stream()
        site.pool.update(ModelRoute(name="m", replicas=(replica("c", 8),)))
        site.machines["c"] = Machine()
        await site.until("c", "ready", 1.0)
        assert (await site.pool.lease(request())).replica.id == "c"
        await asyncio.sleep(3)
        assert not lease.is_lost
        site.machines[lease.replica.id].state = "stopped"
        await asyncio.sleep(3)
        assert lease.is_lost
        lease.close("failed")
        await asyncio.sleep(0.1)
        assert [backend.id for backend in site.pool.backends] == ["c"]

    on_site(test)
