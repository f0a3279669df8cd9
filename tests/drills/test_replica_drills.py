"""Clients that leave: what they asked for is given up everywhere, down to the blocks of a real replica's KV cache."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from drill_loads import Question, answers_of, connected, questions, request
from drills_for_tests import Figures, Gateway, Held, Member, address, gateway, gauge, members, start_demo

from powerband.http_client.connection import CollectedResponse

ASKED = questions(8, 96)


def test_disconnects(tmp_path: Path, figures: Figures) -> None:
    """500 client disconnects at random"""
    chance = random.Random(1)
    count, most = 500, 24

    async def one(service: Gateway, question: Question, limit: asyncio.Semaphore) -> None:
        target = service.target()
        async with limit, connected(target) as connection:
            answer = CollectedResponse()
            connection.send((request(target, target.path, question.body),), answer)
            await asyncio.wait([answer.done], timeout=chance.expovariate(1 / 0.15))

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


async def _all_is_quiet(service: Gateway, replica: Member) -> None:
    async with asyncio.timeout(60.0):
        while True:
            pool = await service.pool()
            running = await gauge(replica.url, "powerband_requests_running")
            if not running and not pool["queued"] and not sum(one["inflight"] for one in pool["replicas"]):
                return
            await asyncio.sleep(0.1)
