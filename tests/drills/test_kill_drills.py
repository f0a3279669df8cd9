"""Kills at random under load: the gateway, the controller, a replica's API process or an engine is killed, stopped,
crashed or told to end, one at a time and two at once. DRILLS_SEED chooses which, DRILLS_KILLS how many.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, islice, product

import pytest
from drill_loads import Load, Told, answers_of, questions
from drill_services import Service, deployed
from drills_for_tests import Figures, engines_of

from powerband.bench.client.http import get
from powerband.bench.client.messages import ServerAddress
from powerband.fleet.targets.processes import ProcessId, identify, is_alive

SEED = int(os.environ.get("DRILLS_SEED", "13"))
KILLS = int(os.environ.get("DRILLS_KILLS", "3"))
SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV, signal.SIGTERM)
MEMBERS = ("gateway", "controller", "replica", "engine")
REPLICAS = 2
ASKED = questions(6, 72)
RATE = 2.0  # what one busy core can make up for after an outage
WHOLE_S = 60.0  # a bound for a busy machine, where the starts alone take that long; 10 on one that does nothing else
_GIVE_UP_S = 90.0
_SETTLE_S = 1.0


@dataclass(frozen=True)
class Strike:
    """signals: by member. whole_s: from the signals until the service was whole again."""

    signals: tuple[tuple[str, signal.Signals], ...]
    at_s: float
    whole_s: float

    @property
    def says(self) -> str:
        return " + ".join(f"{number.name} {member}" for member, number in self.signals)

    def cut(self, told: Told) -> bool:
        """Whether the request failed because the gateway that carried it, or should have taken it, was struck."""
        overlaps = told.sent_s < self.at_s + self.whole_s and told.ended_s > self.at_s
        is_cut = told.status in (0, 200) or (told.status == 503 and told.code == "draining")
        return overlaps and is_cut and any(member == "gateway" for member, _ in self.signals)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with deployed(tmp_path_factory.mktemp("state"), REPLICAS) as found:
        yield found


def test_one_at_a_time(service: Service, figures: Figures) -> None:
    """Kills at random, one at a time"""
    chance = random.Random(SEED)
    singles = list(product(MEMBERS, SIGNALS))
    chance.shuffle(singles)
    asyncio.run(_drill(service, figures, [(one,) for one in islice(cycle(singles), KILLS)], chance))


def test_two_at_once(service: Service, figures: Figures) -> None:
    """Kills at random, two at once"""
    chance = random.Random(SEED + 1)
    pairs = [tuple((member, chance.choice(SIGNALS)) for member in _two(chance)) for _ in range(max(KILLS // 2, 1))]
    asyncio.run(_drill(service, figures, pairs, chance))


def _two(chance: random.Random) -> list[str]:
    """Members, of which replicas and engines are there twice."""
    return chance.sample([*MEMBERS, "replica", "engine"], 2)


async def _drill(
    service: Service,
    figures: Figures,
    chosen: Sequence[Sequence[tuple[str, signal.Signals]]],
    chance: random.Random,
) -> None:
    target = service.front.target()
    answers = await answers_of(target, ASKED)
    strikes: list[Strike] = []
    async with Load(target, ASKED, RATE) as load:
        for one in chosen:
            await asyncio.sleep(_SETTLE_S)
            strikes.append(await _strike(service, tuple(one), chance))
        await asyncio.sleep(_SETTLE_S)
    cut = [told for told in load.failed if any(strike.cut(told) for strike in strikes)]
    lost = [told for told in load.failed if told not in cut]
    wrong = load.wrong(answers)
    wrong += [told for told in load.failed if not answers[told.question.prompt].startswith(told.reading.text)]
    slowest = max(strikes, key=lambda strike: strike.whole_s)
    figures.note(
        seed=SEED,
        strikes=len(strikes),
        requests=len(load.told),
        lost=len(lost),
        wrong=len(wrong),
        cut_with_their_gateway=len(cut),
        whole_again_median_s=statistics.median(strike.whole_s for strike in strikes),
        whole_again_max_s=slowest.whole_s,
        after=slowest.says,
        longest_stall_s=max((told.stall_s for told in load.told if not told.failed), default=0.0),
    )
    assert not lost, [(told.status, told.code, told.reading.problem) for told in lost]
    assert not wrong
    assert slowest.whole_s <= WHOLE_S, slowest.says


async def _strike(service: Service, chosen: tuple[tuple[str, signal.Signals], ...], chance: random.Random) -> Strike:
    """Send the signals, and wait until every process that got one is gone and another is in its place."""
    victims: list[ProcessId] = []
    for member, _ in chosen:
        found = [one for one in _processes(service, member) if one not in victims]
        victims.append(chance.choice(found))
    for victim, (_, number) in zip(victims, chosen, strict=True):
        os.kill(victim.pid, number)
    at_s = time.monotonic()
    while not await _is_whole(service, victims):
        assert time.monotonic() - at_s < _GIVE_UP_S, f"not whole after {chosen}: {service.status}"
        if not service.folder.controller_alive():
            await asyncio.to_thread(service.run, "deploy")  # as its operator does
        await asyncio.sleep(0.05)
    return Strike(chosen, at_s, time.monotonic() - at_s)


def _processes(service: Service, member: str) -> list[ProcessId]:
    status = service.status
    pids = {"gateway": [status.gateway.pid], "controller": [status.pid]}.get(member)
    pids = [one.pid for one in status.replicas if one.state == "ready"] if pids is None else pids
    if member == "engine":
        pids = [child for pid in pids for child in engines_of(pid)]
    found = [identify(pid) for pid in pids]
    return [one for one in found if one is not None]


async def _is_whole(service: Service, victims: Sequence[ProcessId]) -> bool:
    """Nobody is left of those who were struck; all replicas say that they are ready, and the gateway says so, too."""
    if any(is_alive(victim) for victim in victims) or not service.folder.controller_alive():
        return False
    status = service.status
    replicas = [one for one in status.replicas if one.state == "ready" and engines_of(one.pid)]
    if status.phase != "ready" or len(replicas) != REPLICAS:
        return False
    if None in (identify(status.pid), identify(status.gateway.pid)):
        return False  # a new controller has not written its status yet: this one is of the controller before
    with suppress(OSError, TimeoutError, AssertionError, IndexError):
        async with asyncio.timeout(1.0):
            doors = [ServerAddress(base=one.url, endpoint="completions", model="") for one in replicas]
            are_ready = [(await get(door, "/readyz")).status == 200 for door in doors]
            return all(are_ready) and set(await service.front.ready_replicas()) == {one.id for one in replicas}
    return False
