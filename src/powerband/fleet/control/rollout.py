"""From what should run and what runs, to the next moves. Pure and without memory: asked again, it goes on from what is.

    missing ──► start ──► starting ──► ready ──► draining ──► stop
                            outdated, too many: only while enough others are ready

Replicas are replaced one at a time: never more than the asked number plus `surge` exist (those that are ending count:
they still hold memory), and never are fewer ready than asked (one fewer, where surge is 0), as long as as many were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

InstancePhase = Literal["starting", "ready", "stopping"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaView:
    """A replica that exists.

    state: ready: once it was. well: it answers that it is. set_aside: a user wants it to get nothing new. hung: it has
    to go at once. condemned: another is to take its place, in good order. draining: it has been getting nothing new
    already. empty: it has none left, or had time enough.
    """

    id: str
    number: int  # the later it was started, the larger
    pool: int
    revision: str
    state: InstancePhase = "starting"
    well: bool = True
    set_aside: bool = False
    hung: bool = False
    condemned: bool = False
    draining: bool = False
    empty: bool = False

    @property
    def serves(self) -> bool:
        return self.state == "ready" and self.well and not self.set_aside and not self.hung


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredReplicas:
    """counts, revisions: of each pool. held: revisions of which none is started now, since they keep failing."""

    counts: tuple[int, ...]
    revisions: tuple[str, ...]
    surge: int = 1
    held: Collection[str] = ()

    @property
    def total(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class Actions:
    """start: a pool for each new replica. drain: replicas that get nothing new. stop: to be ended; kill: at once."""

    start: tuple[int, ...] = ()
    drain: frozenset[str] = frozenset()
    stop: tuple[str, ...] = ()
    kill: tuple[str, ...] = ()


@dataclass(slots=True)
class _Availability:
    """What is left while moves are chosen."""

    want: DesiredReplicas
    serving: Counter[int] = field(default_factory=Counter)  # by pool
    set_aside: Counter[int] = field(default_factory=Counter)

    def may_lose(self, pool: int) -> bool:
        """Whether a replica of this pool may stop serving: enough others do, in its pool and in all."""
        asked = self.want.counts[pool] if pool < len(self.want.counts) else 0
        slack = 0 if self.want.surge else 1
        enough_here = self.serving[pool] - 1 >= asked - self.set_aside[pool] - slack
        enough_in_all = self.serving.total() - 1 >= self.want.total - self.set_aside.total() - slack
        return enough_here and enough_in_all


def next_actions(want: DesiredReplicas, members: Sequence[ReplicaView]) -> Actions:
    alive = [member for member in members if member.state != "stopping"]
    kill = [member.id for member in members if member.hung]  # also one that was asked to end: it does not hear it
    alive = [member for member in alive if not member.hung]
    kept = _retained(want, alive)
    leaving = [member for member in alive if member.id not in kept]
    board = _Availability(want, Counter(m.pool for m in alive if m.serves))
    board.set_aside.update(m.pool for m in alive if m.set_aside and m.id in kept)
    drain, stop = set(), []
    # What is draining goes on draining, then the oldest: a new one has just been paid for.
    for member in sorted(leaving, key=lambda m: (not m.draining, m.number)):
        if member.state == "starting":
            stop.append(member.id)
        elif not member.serves or board.may_lose(member.pool):
            board.serving[member.pool] -= member.serves
            drain.add(member.id)
            if member.draining and member.empty:
                stop.append(member.id)
    drain |= {member.id for member in alive if member.set_aside}
    return Actions(_starts(want, members, kept), frozenset(drain), tuple(stop), tuple(kill))


def _retained(want: DesiredReplicas, alive: Sequence[ReplicaView]) -> dict[str, ReplicaView]:
    """Of each pool as many of its revision as are asked for; what serves goes before what does not, old before new."""
    kept: dict[str, ReplicaView] = {}
    for pool, (count, revision) in enumerate(zip(want.counts, want.revisions, strict=True)):
        fitting = [m for m in alive if (m.pool, m.revision) == (pool, revision) and not m.condemned]
        fitting.sort(key=lambda m: (m.draining and not m.set_aside, not m.serves, m.state != "ready", m.number))
        kept |= {member.id: member for member in fitting[:count]}
    return kept


def _starts(want: DesiredReplicas, members: Sequence[ReplicaView], kept: dict[str, ReplicaView]) -> tuple[int, ...]:
    room = want.total + want.surge - len(members)
    have = Counter(member.pool for member in kept.values())
    missing = [
        pool
        for pool, (count, revision) in enumerate(zip(want.counts, want.revisions, strict=True))
        if revision not in want.held
        for _ in range(count - have[pool])
    ]
    return tuple(missing[: max(room, 0)])
