"""What happens to a deployed service, three replicas of the demo model, while people use it.

Every prompt is decoded greedily and has one right answer, which is known from a time when nothing happened. The drills
share one service; each leaves it whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from drill_loads import Load, answers_of, questions
from drill_services import Service, changed, deployed
from drills_for_tests import Figures, Held, gauge, minutes, wait_until

ASKED = questions(6, 72)
RATE = 4.0  # requests a second: a fifth of what three replicas on two cores can do, when nobody else uses them
# Bounds for a busy machine, where a start alone takes that long: 10 and 3 on one that does nothing else.
BACK_S, AWAY_S = 60.0, 30.0
Answers = dict[str, str]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with deployed(tmp_path_factory.mktemp("state")) as found:
        yield found


@pytest.fixture(scope="module")
def answers(service: Service) -> Answers:
    """What the service says when nobody disturbs it."""
    return asyncio.run(answers_of(service.front.target(), ASKED))


def test_sigkill(service: Service, answers: Answers, figures: Figures) -> None:
    """SIGKILL one of three replicas"""
    victim, pid = sorted(service.pids().items())[0]

    async def disturb(load: Load) -> float:
        await _stop_in_the_middle(service, victim, pid, load)
        os.killpg(pid, signal.SIGKILL)
        return await asyncio.to_thread(service.wait_whole, 3, BACK_S, victim)

    back_s, load, records = asyncio.run(_under_load(service, disturb))
    resumed = sum(record["resumed"] for record in records)
    figures.note(back_to_three_s=back_s, resumed=resumed, **_told(load, answers))
    _assert_nobody_noticed(load, answers)
    assert resumed
    assert back_s <= BACK_S


def test_sigstop(service: Service, answers: Answers, figures: Figures) -> None:
    """SIGSTOP a replica"""
    victim, pid = sorted(service.pids().items())[0]

    async def disturb(load: Load) -> tuple[float, float]:
        start_s = await _stop_in_the_middle(service, victim, pid, load)
        while await _has_requests(service, victim):
            await asyncio.sleep(0.02)
        away_s = time.monotonic() - start_s
        await asyncio.to_thread(service.wait_whole, 3, BACK_S, victim)
        return away_s, time.monotonic() - start_s

    (away_s, back_s), load, records = asyncio.run(_under_load(service, disturb))
    resumed = sum(record["resumed"] for record in records)
    figures.note(traffic_away_s=away_s, replaced_after_s=back_s, resumed=resumed, **_told(load, answers))
    _assert_nobody_noticed(load, answers)
    assert away_s <= AWAY_S


def test_rolling_update(service: Service, answers: Answers, figures: Figures) -> None:
    """Rolling update"""
    before = service.pids()

    async def disturb(_: Load) -> float:
        start_s = time.monotonic()
        await asyncio.to_thread(service.deploy, changed(max_num_seqs=12))
        return time.monotonic() - start_s

    took_s, load, records = asyncio.run(_under_load(service, disturb))
    after = service.pids()
    moved = sum(len(record["replicas"]) != 1 for record in records)
    replaced = len(after.keys() - before.keys())
    figures.note(took_s=took_s, replaced=replaced, sent_to_another=moved, **_told(load, answers))
    _assert_nobody_noticed(load, answers)
    assert not moved  # each replica was drained: what ran there when it ended would have gone on elsewhere
    assert len(after) == 3
    assert not after.keys() & before.keys()
    service.deploy(changed(max_num_seqs=12))
    assert service.pids() == after  # the same again changes nothing


def test_controller_killed(service: Service, answers: Answers, figures: Figures) -> None:
    """Kill the controller"""
    before, controller, gateway = service.pids(), service.status.pid, service.status.gateway.pid
    victim, pid = sorted(before.items())[0]

    async def disturb(_: Load) -> tuple[float, float]:
        os.kill(controller, signal.SIGKILL)
        await asyncio.sleep(1.5)
        start_s = time.monotonic()
        await asyncio.to_thread(service.run, "deploy")
        await asyncio.to_thread(wait_until, lambda: service.status.pid != controller, 60.0)
        taken_over_s = time.monotonic() - start_s
        assert service.pids() == before
        assert service.status.gateway.pid == gateway
        os.killpg(pid, signal.SIGKILL)
        return taken_over_s, await asyncio.to_thread(service.wait_whole, 3, BACK_S, victim)

    (taken_over_s, back_s), load, _ = asyncio.run(_under_load(service, disturb))
    figures.note(taken_over_s=taken_over_s, then_a_replica_back_s=back_s, **_told(load, answers))
    _assert_nobody_noticed(load, answers)


def test_soak(service: Service, answers: Answers, figures: Figures) -> None:
    """Soak at 70 % load"""
    service.wait_whole()
    capacity = asyncio.run(_capacity(service))
    rate, seconds = 0.7 * capacity, 60 * minutes()

    async def soak() -> tuple[Load, dict[str, Held], dict[str, Held]]:
        async with Load(service.front.target(), ASKED, rate) as load:
            await asyncio.sleep(min(seconds / 4, 60.0))  # warm
            before = _held(service)
            await asyncio.sleep(seconds)
            after = _held(service)
        return load, before, after

    load, before, after = asyncio.run(soak())
    wait_until(lambda: asyncio.run(_blocks(service)) == 0, 60.0)
    grown = {name: (after[name].memory_bytes - before[name].memory_bytes) / 2**20 for name in before}
    more = {name: after[name].descriptors - before[name].descriptors for name in before}
    ttfts = sorted(told.ttft_s for told in load.told)
    figures.note(
        minutes=minutes(),
        rate=rate,
        ttft_p50_ms=1e3 * ttfts[len(ttfts) // 2],
        grown_mib="/".join(f"{name} {value:.1f}" for name, value in grown.items()),
        descriptors="/".join(f"{name} {value:+d}" for name, value in more.items()),
        blocks_left=0,
        **_told(load, answers),
    )
    _assert_nobody_noticed(load, answers)
    assert max(grown.values()) < 48
    assert max(more.values()) < 32


async def _under_load(
    service: Service, disturb: Callable[[Load], Awaitable[Any]]
) -> tuple[Any, Load, list[dict[str, Any]]]:
    """What it found out, the load, and the gateway's records of it."""
    seen = (await service.front.ask("/admin/records"))["newest"]
    async with Load(service.front.target(), ASKED, RATE) as load:
        await asyncio.sleep(0.5)
        found = await disturb(load)
        await asyncio.sleep(1.0)
    return found, load, await service.front.records(seen)


def _told(load: Load, answers: Answers) -> dict[str, Any]:
    stall_s = max(told.stall_s for told in load.told)
    wrong = len(load.wrong(answers))
    return {"requests": len(load.told), "failed": len(load.failed), "wrong": wrong, "longest_stall_s": stall_s}


def _assert_nobody_noticed(load: Load, answers: Answers) -> None:
    assert not load.failed, load.problems()
    assert not load.wrong(answers)


async def _stop_in_the_middle(service: Service, replica: str, pid: int, load: Load) -> float:
    """SIGSTOP while it streams an answer; when that was, on the monotonic clock.

    Some answer is certain to be cut after its first token, however fast the replica is: the gateway says that the
    stopped replica has a request, and all requests under way have had a token.
    """
    async with asyncio.timeout(60.0):
        while True:
            if await _inflight(service, replica):
                start_s = time.monotonic()
                os.killpg(pid, signal.SIGSTOP)
                await asyncio.sleep(0.05)
                running = [told for told in load.told if not told.ended_s]
                if await _inflight(service, replica) and all(told.is_streaming for told in running):
                    return start_s
                os.killpg(pid, signal.SIGCONT)
            await asyncio.sleep(0.01)


async def _inflight(service: Service, replica: str) -> int:
    return sum(one["inflight"] for one in (await service.front.pool())["replicas"] if one["id"] == replica)


async def _has_requests(service: Service, replica: str) -> bool:
    """Or could get some."""
    shown = (await service.front.pool())["replicas"]
    return any(one["id"] == replica and (one["state"] == "ready" or one["inflight"]) for one in shown)


async def _capacity(service: Service) -> float:
    """Requests a second, of more users than there are places."""
    done, start_s = 0, time.monotonic()

    async def user() -> None:
        nonlocal done
        while time.monotonic() - start_s < 3.0:
            await answers_of(service.front.target(), ASKED[:1])
            done += 1

    await asyncio.gather(*(user() for _ in range(48)))
    return done / (time.monotonic() - start_s)


async def _blocks(service: Service) -> float:
    """Requests that replicas still hold blocks for."""
    return sum([await gauge(one.url, "powerband_requests_running") for one in service.status.replicas])


def _held(service: Service) -> dict[str, Held]:
    status = service.status
    found = {"controller": Held.by(status.pid), "gateway": Held.by(status.gateway.pid)}
    with contextlib.suppress(FileNotFoundError):
        found |= {one.id: Held.by(one.pid) for one in status.replicas}
    return found
