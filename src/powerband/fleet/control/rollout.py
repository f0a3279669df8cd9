"""The next actions of a rollout: a pure, stateless function of the desired and the observed replicas.

    missing ──► start ──► starting ──► ready ──► draining ──► stop
                            outdated or surplus: only while enough others are ready

Replicas are replaced one at a time. At most desired plus `max_surge` replicas exist (including stopping ones, which
still hold memory). At least the desired number serve (one fewer if `max_surge` is 0), unless replicas fail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from powerband.fleet.control.instance_state import InstanceState


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredReplicas:
    counts: tuple[int, ...]  # by pool
    revisions: tuple[str, ...]  # by pool
    max_surge: int = 1
    drain_timeout_s: float = 120.0
    backing_off: Collection[str] = ()  # revisions not to start now, because their replicas keep crashing

    @property
    def total(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class Actions:
    start: tuple[int, ...] = ()  # the pool of each new replica
    drain: frozenset[str] = frozenset()  # ids of all replicas that should get no new requests
    stop: tuple[str, ...] = ()
    kill: tuple[str, ...] = ()


@dataclass(slots=True)
class _Availability:
    """Counts the serving replicas while actions are chosen."""

    desired: DesiredReplicas
    serving: Counter[int] = field(default_factory=Counter)  # by pool
    cordoned: Counter[int] = field(default_factory=Counter)  # by pool

    def may_drop(self, pool: int) -> bool:
        """Whether a replica of this pool may stop serving: enough others serve, in its pool and in total."""
        desired = self.desired.counts[pool] if pool < len(self.desired.counts) else 0
        slack = 0 if self.desired.max_surge else 1
        enough_in_pool = self.serving[pool] - 1 >= desired - self.cordoned[pool] - slack
        enough_in_all = self.serving.total() - 1 >= self.desired.total - self.cordoned.total() - slack
        return enough_in_pool and enough_in_all


def next_actions(desired: DesiredReplicas, replicas: Sequence[InstanceState], now_s: float) -> Actions:
    """now_s: on the clock of the replicas' times."""
    kill = [replica.id for replica in replicas if replica.is_hung]  # even a stopping one: it ignores SIGTERM
    alive = [replica for replica in replicas if replica.phase != "stopping" and not replica.is_hung]
    retained = _retained(desired, alive)
    available = _Availability(desired, Counter(one.pool for one in alive if one.is_serving))
    available.cordoned.update(one.pool for one in alive if one.is_cordoned and one.id in retained)
    drain, stop = set(), []
    leaving = [replica for replica in alive if replica.id not in retained]
    # First those that are draining already, then the oldest: starting the new ones was expensive.
    for replica in sorted(leaving, key=lambda one: (not one.is_draining, one.number)):
        if replica.phase == "starting":
            stop.append(replica.id)
        elif not replica.is_serving or available.may_drop(replica.pool):
            available.serving[replica.pool] -= replica.is_serving
            drain.add(replica.id)
            if replica.is_drained(desired.drain_timeout_s, now_s):
                stop.append(replica.id)
    drain |= {replica.id for replica in alive if replica.is_cordoned}
    return Actions(_starts(desired, replicas, retained), frozenset(drain), tuple(stop), tuple(kill))


def _retained(desired: DesiredReplicas, alive: Sequence[InstanceState]) -> dict[str, InstanceState]:
    """The replicas to keep: for each pool, the desired number of its revision; serving ones first, then older ones."""
    retained: dict[str, InstanceState] = {}
    for pool, (count, revision) in enumerate(zip(desired.counts, desired.revisions, strict=True)):
        current = [one for one in alive if (one.pool, one.revision) == (pool, revision) and not one.pending_replacement]
        current.sort(
            key=lambda one: (
                one.is_draining and not one.is_cordoned,
                not one.is_serving,
                one.phase != "ready",
                one.number,
            )
        )
        retained |= {replica.id: replica for replica in current[:count]}
    return retained


def _starts(
    desired: DesiredReplicas, replicas: Sequence[InstanceState], retained: dict[str, InstanceState]
) -> tuple[int, ...]:
    room = desired.total + desired.max_surge - len(replicas)
    have = Counter(replica.pool for replica in retained.values())
    missing = [
        pool
        for pool, (count, revision) in enumerate(zip(desired.counts, desired.revisions, strict=True))
        if revision not in desired.backing_off
        for _ in range(count - have[pool])
    ]
    return tuple(missing[: max(room, 0)])
