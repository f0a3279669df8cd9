"""Two replicas and a gateway under attack, while others use them. The rule: no client and no replica stops others,
takes memory of more than ten times what it sent, keeps what it took after it left, or changes another's answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from drill_loads import Load, answers_of, put, questions
from drills_for_tests import (
    Figures,
    Gateway,
    Held,
    Member,
    address,
    engines_of,
    gateway,
    gauge,
    members,
    routes_of,
    start_demo,
)
from hostile_clients import ATTACKS, LIAR, Attack, Doors, Liar, held_open

from powerband.bench.client.http import get
from powerband.bench.client.messages import ServerAddress
from powerband.gateway.routes import ModelRoute, ReplicaAddress, Routes

HELD_S = float(os.environ.get("DRILLS_HELD_S", "0"))  # longer than every time-out of a connection; 0: not tried
ASKED = questions(6, 32)
RATE = 4.0
CALM_S = 3.0
AFTER_S = 1.0
MAX_LEFT, LEFT_S = 4, 5.0
# Bounds that hold on a busy machine of two cores; on a quiet one others notice no pause of 100 ms.
PAUSE_S, TTFT_S = 1.0, 2.0
NOISE_BYTES = 48 << 20  # others' requests, and what allocators keep
_PING_S = 0.05


@dataclass
class Site:
    """What is attacked."""

    service: Gateway
    replicas: Sequence[Member]

    @property
    def doors(self) -> Doors:
        return Doors(self.service.member.port, self.replicas[0].port)

    @property
    def memory_bytes(self) -> int:
        """Of the gateway, the replicas and their engines."""
        pids = [self.service.pid, *(pid for one in self.replicas for pid in (one.pid, *engines_of(one.pid)))]
        with contextlib.suppress(OSError):
            return sum(Held.by(pid).memory_bytes for pid in pids)
        return 0

    async def running(self) -> float:
        """Requests, at the engines."""
        return sum([await gauge(one.url, "powerband_requests_running") for one in self.replicas])


@dataclass
class Seen:
    """What others noticed in a time: how long they waited at most for a page, how much memory was taken."""

    began_s: float = field(default_factory=time.monotonic)
    ended_s: float = 0.0
    pause_s: float = 0.0
    peak_bytes: int = 0

    def ttft_s(self, load: Load) -> float:
        """The slowest first token of what was asked meanwhile; read when all has ended."""
        told = [one for one in load.told if self.began_s <= one.sent_s < self.ended_s and not one.failed]
        return max((one.ttft_s for one in told), default=0.0)


@dataclass(frozen=True)
class Attacked:
    """One attack, and what it did. left: requests that go on without their clients. ready: replicas, in the end."""

    name: str
    seen: Seen
    sent: int
    grown: int
    kept: int
    left: float
    ready: int

    def faults(self, load: Load, calm: Seen, replicas: int) -> list[str]:
        """What broke the rule."""
        ttft_s = self.seen.ttft_s(load)
        checks = {
            f"others waited {self.seen.pause_s:.1f} s": self.seen.pause_s > max(PAUSE_S, 3 * calm.pause_s),
            f"a first token took {ttft_s:.1f} s": ttft_s > calm.ttft_s(load) + TTFT_S,
            f"{self.left:.0f} requests go on": self.left > MAX_LEFT,
            f"{self.ready} of {replicas} replicas are ready": self.ready < replicas,
        }
        return [f"{self.name}: {says}" for says in (*_true_of(checks), *self.memory_faults())]

    def memory_faults(self) -> list[str]:
        return _true_of(
            {
                f"{_mib(self.grown)} for {_mib(self.sent)} sent": self.grown > 10 * self.sent + NOISE_BYTES,
                f"{_mib(self.kept)} are kept": self.kept > NOISE_BYTES,
            }
        )

    def told(self, load: Load) -> str:
        others = f"pause {1e3 * self.seen.pause_s:.0f} ms, TTFT {1e3 * self.seen.ttft_s(load):.0f} ms"
        return f"{others}, {_mib(self.sent)} sent, {_mib(self.grown)} taken, {_mib(self.kept)} kept"


def _true_of(checks: dict[str, bool]) -> list[str]:
    return [says for says, is_so in checks.items() if is_so]


def _mib(size: float) -> str:
    return f"{size / (1 << 20):.1f} MiB"


def test_attacks(tmp_path: Path, figures: Figures) -> None:
    """Hostile clients and a lying replica"""
    with (
        members([start_demo(tmp_path), start_demo(tmp_path)]) as replicas,
        gateway(tmp_path / "gateway", [address(one) for one in replicas]) as service,
    ):
        faults = asyncio.run(_drill(Site(service, replicas), figures))
    assert not faults, faults


async def _drill(site: Site, figures: Figures) -> list[str]:
    """What broke the rule."""
    target, held = site.service.target(), 0
    async with Liar.listening() as port:
        await _serve_both(site, port)
        answers = await answers_of(target, ASKED)
        async with Load(target, ASKED, RATE) as load:
            async with _watching(site) as calm:
                await asyncio.sleep(CALM_S)
            attacked = [await _attacked(site, attack) for attack in ATTACKS]
            if HELD_S:
                held = await held_open(site.doors, HELD_S)
    wrong = load.wrong(answers)
    figures.note(calm=f"pause {1e3 * calm.pause_s:.0f} ms, TTFT {1e3 * calm.ttft_s(load):.0f} ms")
    figures.note(**{one.name: one.told(load) for one in attacked})
    if HELD_S:
        figures.note(held_open=f"{held} of 100 after {HELD_S:g} s")
    figures.note(requests=len(load.told), failed=len(load.failed), wrong=len(wrong))
    faults = [fault for one in attacked for fault in one.faults(load, calm, len(site.replicas))]
    faults += [f"{held} connections outlived their time-outs"] if held else []
    faults += [f"{len(load.failed)} requests of others failed: {load.problems()}"] if load.failed else []
    faults += [f"{len(wrong)} wrong answers"] if wrong else []
    return faults


async def _attacked(site: Site, attack: Attack) -> Attacked:
    """The attack, and once more if it took too much memory: what a first use takes (blocks of the KV cache, buffers of
    larger batches) is not taken again, a leak is.
    """
    first = await _attacked_once(site, attack)
    if not first.memory_faults():
        return first
    again = await _attacked_once(site, attack)
    return replace(first, grown=min(first.grown, again.grown), kept=min(first.kept, again.kept))


async def _attacked_once(site: Site, attack: Attack) -> Attacked:
    before, usual = site.memory_bytes, await site.running()
    async with _watching(site) as seen:
        sent = await attack(site.doors)
        await asyncio.sleep(AFTER_S)
    left = await _left(site, usual)
    kept = site.memory_bytes - before
    return Attacked(attack.__name__, seen, sent, seen.peak_bytes - before, kept, left, await _ready(site))


async def _left(site: Site, usual: float) -> float:
    """Requests that go on without their clients, when engines have had the time to notice."""
    deadline_s = time.monotonic() + LEFT_S
    while (left := await site.running() - usual) > MAX_LEFT and time.monotonic() < deadline_s:
        await asyncio.sleep(_PING_S)
    return left


async def _ready(site: Site) -> int:
    with contextlib.suppress(OSError, TimeoutError, AssertionError):
        pools = (await site.service.ask("/admin/routes"))["pools"]
        own = {address(one).id for one in site.replicas}
        return sum(one["id"] in own and one["state"] == "ready" for pool in pools for one in pool["replicas"])
    return 0


@contextlib.asynccontextmanager
async def _watching(site: Site) -> AsyncIterator[Seen]:
    """Ask each door for a page, many times a second, and look at the memory."""
    seen = Seen()
    tasks = [asyncio.create_task(_ping(url, seen)) for url in (site.service.url, *(one.url for one in site.replicas))]
    tasks.append(asyncio.create_task(_look(site, seen)))
    try:
        yield seen
    finally:
        seen.ended_s = time.monotonic()
        await asyncio.gather(*tasks)


async def _ping(url: str, seen: Seen) -> None:
    """Until it is over, and answered."""
    target = ServerAddress(base=url, endpoint="completions", model="")
    while not seen.ended_s:
        began_s = time.monotonic()
        with contextlib.suppress(OSError, TimeoutError):
            await get(target, "/livez", timeout_s=30.0)
        seen.pause_s = max(seen.pause_s, time.monotonic() - began_s)
        await asyncio.sleep(_PING_S)


async def _look(site: Site, seen: Seen) -> None:
    while not seen.ended_s:
        seen.peak_bytes = max(seen.peak_bytes, site.memory_bytes)
        await asyncio.sleep(_PING_S)


async def _serve_both(site: Site, port: int) -> None:
    """The model that all use, and one whose replica lies."""
    own = routes_of([address(one) for one in site.replicas], "").models
    liar = ReplicaAddress(id=LIAR, url=f"http://127.0.0.1:{port}", model=LIAR, max_num_seqs=64)
    routes = Routes(models=(*own, ModelRoute(name=LIAR, replicas=(liar,))), revision="attacked")
    page = await put(site.service.admin, "/admin/routes", routes.as_dict())
    assert page.status == 200, page.body
    async with asyncio.timeout(15.0):
        while await _ready(site) < len(site.replicas):
            await asyncio.sleep(0.05)
