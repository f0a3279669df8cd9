"""What happens to a gateway's books: keys that are revoked, limits that are reached, thousands of bad keys, bad disks.

Its replicas are scripted. Whoever has a good key must not notice any of it.
"""

from __future__ import annotations

import asyncio
import resource
import sqlite3
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drill_loads import Load, answers_of, connected, questions, request
from drills_for_tests import Figures, Gateway, Held, address, gateway, members, start_scripted

from powerband.bench.client.messages import ServerAddress
from powerband.http_client.connection import CollectedResponse, OutboundConnection
from powerband.mock_server.behavior import Behavior

PACED = Behavior(ttft_s=0.05, tpot_s=0.01)
ASKED = questions(8, 16)
RATE = 20.0
BAD_KEYS = 3000


async def new_key(service: Gateway, name: str, **limits: Any) -> tuple[str, ServerAddress]:
    """Its id, and the gateway as it sees it."""
    made = (await service.post("/admin/keys", {"name": name, "limits": limits})).json()
    return made["id"], service.target(headers={"Authorization": f"Bearer {made['secret']}"})


def test_keys(tmp_path: Path, figures: Figures) -> None:
    """Key revoked, limits reached, bad keys by the thousand"""

    async def drill(service: Gateway) -> None:
        _, good = await new_key(service, "good")
        answers = await answers_of(good, ASKED)
        async with Load(good, ASKED, RATE) as alone:
            await asyncio.sleep(3.0)
        async with Load(good, ASKED, RATE) as crowded:
            await revoked_at_once(service, figures)
            await held_to_limits(service, figures)
            await bad_keys(service, good, figures)
        assert not alone.failed
        assert not crowded.failed, crowded.problems()
        assert not crowded.wrong(answers)
        before_s, after_s = ttft_p95(alone), ttft_p95(crowded)
        figures.note(others_failed=0, others_ttft_p95_ms=f"{1e3 * before_s:.0f} → {1e3 * after_s:.0f}")
        assert after_s < before_s + 1.0  # 0.2 on a machine that does nothing else

    with (
        members([start_scripted(tmp_path, PACED) for _ in range(2)]) as replicas,
        gateway(tmp_path / "gateway", [address(one, max_num_seqs=64) for one in replicas], "--auth=keys") as service,
    ):
        asyncio.run(drill(service))


async def revoked_at_once(service: Gateway, figures: Figures) -> None:
    """The first request after the answer to DELETE is refused; the stream that ran goes on to its end."""
    id, target = await new_key(service, "leaked")
    async with Load(target, questions(1, 100), rate=1.0) as running:
        await until(lambda: any(told.is_streaming for told in running.told))
        streaming = next(told for told in running.told if told.is_streaming)
        start_s = time.monotonic()
        assert (await service.delete(f"/admin/keys/{id}")).status == 200
        revoke_s = time.monotonic() - start_s
        async with Load(target, ASKED, rate=100.0) as refused:
            await until(lambda: len(refused.told) >= 10)
    assert {told.status for told in refused.told} == {401}
    assert not streaming.failed
    figures.note(revoked_ms=1e3 * revoke_s)


async def held_to_limits(service: Gateway, figures: Figures) -> None:
    """A hundred at once: exactly as many are served as may be."""
    id, target = await new_key(service, "limited", requests_per_min=25, tokens_per_min=10_000)
    async with Load(target, ASKED, rate=1000.0) as crowd:
        await until(lambda: len(crowd.told) > 60)
    codes = Counter(told.code or "served" for told in crowd.told)
    assert len(crowd.told) > 50
    assert codes["served"] == 25
    assert set(codes) == {"served", "requests_limit"}
    used = (await service.ask(f"/admin/keys/{id}"))["used"]
    assert used["running"] == 0
    assert used["tokens_last_min"] == sum(told.reading.prompt_tokens + 16 for told in crowd.told if not told.failed)
    figures.note(served_of_25=codes["served"], asked=len(crowd.told))


async def bad_keys(service: Gateway, good: ServerAddress, figures: Figures) -> None:
    """Near misses take as long as nonsense, and leave nothing behind."""
    before = Held.by(service.pid)
    secret = good.headers["Authorization"]
    kinds = {"near": secret[:-1] + "~", "far": "Bearer pb-" + "x" * 43, "long": "Bearer " + "y" * 4000}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    async with connected(good) as connection:
        for number in range(BAD_KEYS):
            kind = ("near", "far", "long")[number % 3]
            seconds[kind].append(await refused_in(connection, good, kinds[kind]))
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    after = Held.by(service.pid)
    figures.note(
        bad_keys=BAD_KEYS,
        near_over_far=f"{medians['near'] / medians['far']:.3f}",
        refused_median_ms=1e3 * medians["far"],
        grown_kib=(after.memory_bytes - before.memory_bytes) >> 10,
    )
    assert 0.8 < medians["near"] / medians["far"] < 1.25
    assert after.memory_bytes - before.memory_bytes < 16 << 20
    assert after.descriptors <= before.descriptors + 50  # those of the load beside it


async def refused_in(connection: OutboundConnection, target: ServerAddress, header: str) -> float:
    asked = request(
        ServerAddress(
            base=target.base, endpoint=target.endpoint, model=target.model, headers={"Authorization": header}
        ),
        target.path,
        ASKED[0].body,
    )
    start_s = time.perf_counter()
    answer = CollectedResponse()
    await connection.exchange((asked,), answer)
    assert answer.status == 401
    return time.perf_counter() - start_s


def ttft_p95(load: Load) -> float:
    return statistics.quantiles([told.ttft_s for told in load.told], n=20)[-1]


def test_disk(tmp_path: Path, figures: Figures) -> None:
    """Disk full, SQLite locked"""
    folder = tmp_path / "gateway"

    async def drill(service: Gateway) -> None:
        _, target = await new_key(service, "app")
        answers = await answers_of(target, ASKED)
        async with Load(target, ASKED, RATE) as load:
            await asyncio.sleep(1.0)
            resource.prlimit(service.pid, resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
            while not ((full := await books_of(service))["failing_s"] and full["usage_waiting"]):
                await asyncio.sleep(0.05)
            resource.prlimit(service.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            await until_written(service)
            with sqlite3.connect(folder / "gateway.db", isolation_level=None) as other:
                other.execute("BEGIN EXCLUSIVE")
                while not (locked := await books_of(service))["usage_waiting"]:
                    await asyncio.sleep(0.05)
                refused = await service.post("/admin/keys", {"name": "made while locked"})
                other.execute("ROLLBACK")
            await asyncio.sleep(0.5)
        caught_up_s = await until_written(service)
        assert not load.failed, load.problems()
        assert not load.wrong(answers)
        assert (refused.status, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert full["failing_s"] > 0
        assert full["usage_waiting"] > 0
        assert locked["usage_waiting"] > 0
        usage = await service.ask("/admin/usage?by=key&since=1h")
        counted = sum(row["requests"] for row in usage["data"])
        figures.note(
            requests=len(load.told),
            failed=0,
            waited_while_full=full["usage_waiting"],
            waited_while_locked=locked["usage_waiting"],
            caught_up_s=caught_up_s,
            counted=counted - len(answers),
            lost=usage["books"]["usage_dropped"],
        )
        assert counted == len(load.told) + len(answers)
        assert usage["books"]["usage_dropped"] == 0
        assert (await service.ask("/admin/audit?check=1"))["broken_at"] is None

    with (
        members([start_scripted(tmp_path, PACED)]) as replicas,
        gateway(folder, [address(one, max_num_seqs=64) for one in replicas]) as service,
    ):
        asyncio.run(drill(service))


async def books_of(service: Gateway) -> dict[str, Any]:
    """Read over a connection that only reads: while it is locked, even that may take its time."""
    figures = await service.metrics()
    found = {}
    for name, metric in (("usage_waiting", "ledger_rows_buffered"), ("failing_s", "ledger_failing")):
        line = next((one for one in figures.splitlines() if metric in one and not one.startswith("#")), "x 0")
        found[name] = float(line.split()[-1])
    return found


async def until_written(service: Gateway) -> float:
    start_s = time.monotonic()
    while (await books_of(service))["usage_waiting"]:
        assert time.monotonic() - start_s < 60
        await asyncio.sleep(0.05)
    return time.monotonic() - start_s


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(60.0):
        while not is_so():
            await asyncio.sleep(0.005)
