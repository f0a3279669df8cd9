"""What happens to replicas, real ones of the demo model, while people use them through a gateway.

Every prompt is decoded greedily and has one right answer, which is known from a time when nothing happened.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from drill_loads import Load, Question, answers_of, connected, questions, request
from drills_for_tests import Figures, Gateway, Held, Member, address, gateway, gauge, members, start_demo

ASKED = questions(8, 96)
RATE = 6.0  # requests a second: about half of what three replicas on two cores can do


def test_sigkill(tmp_path: Path, figures: Figures) -> None:
    """SIGKILL one of three replicas"""

    async def disturb(_: Gateway, replicas: list[Member], __: Load) -> None:
        await _until_each_is_busy(replicas)
        replicas[0].kill()

    load, answers, records = _with_three(tmp_path, disturb, after_s=3.0)
    resumed = _resumed(records)
    figures.note(
        requests=len(load.told),
        failed=len(load.failed),
        wrong=len(load.wrong(answers)),
        resumed=resumed,
        longest_stall_s=max(told.stall_s for told in load.told),
    )
    assert not load.failed, load.problems()
    assert not load.wrong(answers)
    assert resumed >= 1


def test_sigstop(tmp_path: Path, figures: Figures) -> None:
    """SIGSTOP a replica"""
    away_s = 0.0

    async def disturb(service: Gateway, replicas: list[Member], _: Load) -> None:
        nonlocal away_s
        await _until_each_is_busy(replicas)
        stopped_s = time.monotonic()
        replicas[0].signal(signal.SIGSTOP)
        async with asyncio.timeout(20.0):
            while not await _is_left_alone(service, replicas[0]):
                await asyncio.sleep(0.02)
        away_s = time.monotonic() - stopped_s

    load, answers, records = _with_three(tmp_path, disturb, after_s=3.0)
    figures.note(
        requests=len(load.told),
        failed=len(load.failed),
        wrong=len(load.wrong(answers)),
        resumed=_resumed(records),
        traffic_away_after_s=away_s,
        longest_stall_s=max(told.stall_s for told in load.told),
    )
    assert not load.failed, load.problems()
    assert not load.wrong(answers)
    assert away_s <= 3.0


def test_disconnects(tmp_path: Path, figures: Figures) -> None:
    """500 client disconnects at random"""
    chance = random.Random(1)
    count, most = 500, 24

    async def one(service: Gateway, question: Question, limit: asyncio.Semaphore) -> None:
        target = service.target()
        async with limit, connected(target) as connection:
            _, done = connection.exchange(request(target, target.path, question.body))
            await asyncio.wait([done], timeout=chance.expovariate(1 / 0.15))

    async def drill(service: Gateway, replica: Member) -> tuple[Held, Held]:
        asked = [Question(f"{chance.random()} {'more of it ' * chance.randrange(60)}", 400) for _ in range(count)]
        await asyncio.gather(*(one(service, q, asyncio.Semaphore(1)) for q in ASKED))  # warm
        await _all_is_quiet(service, replica)
        before, limit = Held.by(service.pid), asyncio.Semaphore(most)
        await asyncio.gather(*(one(service, question, limit) for question in asked))
        await _all_is_quiet(service, replica)
        return before, Held.by(service.pid)

    with (
        members([start_demo(tmp_path, "--no-enable-prefix-caching")]) as replicas,
        gateway(tmp_path / "gateway", [address(replicas[0])]) as service,
    ):
        before, after = asyncio.run(drill(service, replicas[0]))
        blocks = asyncio.run(gauge(replicas[0].url, "powerband_kv_cache_usage_ratio"))
        pool = asyncio.run(service.pool())
        assert asyncio.run(answers_of(service.target(), ASKED[:2]))
    grown = (after.memory_bytes - before.memory_bytes) / 2**20
    figures.note(
        left=count,
        blocks_in_use=blocks,
        sockets_left=after.descriptors - before.descriptors,
        gateway_grown_mib=grown,
        in_flight=sum(one["inflight"] for one in pool["replicas"]),
        queued=pool["queued"],
    )
    assert blocks == 0
    assert pool["queued"] == sum(one["inflight"] for one in pool["replicas"]) == 0
    assert after.descriptors - before.descriptors <= most + 2  # idle connections to the replica stay open
    assert grown < 16


def _with_three(
    folder: Path, disturb: Callable[[Gateway, list[Member], Load], Awaitable[None]], *, after_s: float
) -> tuple[Load, dict[str, str], list[dict[str, object]]]:
    """The load, the right answers, and the gateway's records of it."""

    async def drill(service: Gateway, replicas: list[Member]) -> tuple[Load, dict[str, str], list[dict[str, object]]]:
        answers = await answers_of(service.target(), ASKED)
        before = (await service.ask("/admin/records"))["next"]
        async with Load(service.target(), ASKED, RATE) as load:
            await asyncio.sleep(1.0)
            await disturb(service, replicas, load)
            await asyncio.sleep(after_s)
        return load, answers, (await service.ask(f"/admin/records?after={before}"))["records"]

    with (
        members([start_demo(folder) for _ in range(3)]) as replicas,
        gateway(folder / "gateway", [address(one) for one in replicas]) as service,
    ):
        return asyncio.run(drill(service, replicas))


async def _until_each_is_busy(replicas: Sequence[Member]) -> None:
    async with asyncio.timeout(10.0):
        while not all([await gauge(one.url, "powerband_requests_running") for one in replicas]):
            await asyncio.sleep(0.02)


async def _all_is_quiet(service: Gateway, replica: Member) -> None:
    async with asyncio.timeout(20.0):
        while True:
            pool = await service.pool()
            running = await gauge(replica.url, "powerband_requests_running")
            if not running and not pool["queued"] and not sum(one["inflight"] for one in pool["replicas"]):
                return
            await asyncio.sleep(0.1)


def _resumed(records: Sequence[dict[str, object]]) -> int:
    return sum(bool(record["resumed"]) for record in records)


async def _is_left_alone(service: Gateway, replica: Member) -> bool:
    """It gets nothing new, and what it had goes on elsewhere."""
    shown = (await service.pool())["replicas"]
    return any(one["id"] == address(replica).id and one["state"] != "ready" and not one["inflight"] for one in shown)
