"""Two replicas and a gateway under attack, while others use them. The rule: no client and no replica stops others,
takes memory of more than ten times what it sent, keeps what it took after it left, or changes another's answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from drill_loads import Load, Told, answers_of, put, questions
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

from powerband.bench.http import get
from powerband.bench.messages import Target
from powerband.gateway.routes import ModelRoute, ReplicaAddress, Routes

HELD_S = float(os.environ.get("DRILLS_HELD_S", "0"))  # longer than every time-out of a connection; 0: not tried
ASKED = questions(6, 32)
RATE = 4.0
CALM_S = 3.0
AFTER_S = 1.0
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
    told: list[Told] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return max((one.ttft_s for one in self.told if not one.failed), default=0.0)


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
    target, faults = site.service.target(), []
    async with Liar.listening() as port:
        await _serve_both(site, port)
        answers = await answers_of(target, ASKED)
        async with Load(target, ASKED, RATE) as load:
            async with _watching(site, load) as calm:
                await asyncio.sleep(CALM_S)
            figures.note(calm=f"pause {1e3 * calm.pause_s:.0f} ms, TTFT {1e3 * calm.ttft_s:.0f} ms")
            for attack in ATTACKS:
                faults += await _attacked(site, load, attack, calm, figures)
            if HELD_S:
                held = await held_open(site.doors, HELD_S)
                figures.note(held_open=f"{held} of 100 after {HELD_S:g} s")
                faults += [f"{held} connections outlived their time-outs"] if held else []
    wrong = load.wrong(answers)
    figures.note(requests=len(load.told), failed=len(load.failed), wrong=len(wrong))
    faults += [f"others' requests failed: {load.problems()}"] if load.failed else []
    faults += [f"{len(wrong)} wrong answers"] if wrong else []
    return faults


async def _attacked(site: Site, load: Load, attack: Attack, calm: Seen, figures: Figures) -> list[str]:
    before_bytes, usual = site.memory_bytes, await site.running()
    async with _watching(site, load) as seen:
        sent = await attack(site.doors)
        await asyncio.sleep(AFTER_S)
    left = await site.running() - usual
    name, mib = attack.__name__, 1 << 20
    grown, kept = seen.peak_bytes - before_bytes, site.memory_bytes - before_bytes
    figures.note(
        **{
            name: f"pause {1e3 * seen.pause_s:.0f} ms, TTFT {1e3 * seen.ttft_s:.0f} ms, "
            f"{sent / mib:.1f} MiB sent, +{grown / mib:.0f} MiB, +{kept / mib:.0f} kept"
        }
    )
    ready = await _ready(site)
    checks = {
        f"others waited {seen.pause_s:.1f} s": seen.pause_s > max(PAUSE_S, 3 * calm.pause_s),
        f"a first token took {seen.ttft_s:.1f} s": seen.ttft_s > calm.ttft_s + TTFT_S,
        f"{grown / mib:.0f} MiB for {sent / mib:.1f} sent": grown > 10 * sent + NOISE_BYTES,
        f"{kept / mib:.0f} MiB are kept": kept > NOISE_BYTES,
        f"{left:.0f} requests go on": left > 4,
        f"{ready} of {len(site.replicas)} replicas are ready": ready < len(site.replicas),
    }
    return [f"{name}: {says}" for says, is_so in checks.items() if is_so]


async def _ready(site: Site) -> int:
    with contextlib.suppress(OSError, TimeoutError, AssertionError):
        pools = (await site.service.ask("/admin/routes"))["pools"]
        own = {address(one).id for one in site.replicas}
        return sum(one["id"] in own and one["state"] == "ready" for pool in pools for one in pool["replicas"])
    return 0


@contextlib.asynccontextmanager
async def _watching(site: Site, load: Load) -> AsyncIterator[Seen]:
    """Ask each door for a page, many times a second, and look at the memory."""
    seen, first = Seen(), len(load.told)
    pinging = [asyncio.create_task(_ping(url, seen)) for url in (site.service.url, *(one.url for one in site.replicas))]
    looking = asyncio.create_task(_look(site, seen))
    try:
        yield seen
    finally:
        await asyncio.gather(*pinging, looking, _end(seen))
        seen.told = [one for one in load.told[first:] if one.ended_s]


async def _end(seen: Seen) -> None:
    seen.ended_s = time.monotonic()


async def _ping(url: str, seen: Seen) -> None:
    """Until it is over, and answered."""
    target = Target(base=url, endpoint="completions", model="")
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
