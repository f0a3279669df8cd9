"""Actions of a rollout in a world that checks them: never too many replicas, never too few serving, always an end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from powerband.fleet.control.instance_state import InstanceState
from powerband.fleet.control.rollout import Actions, DesiredReplicas, next_actions
from powerband.fleet.targets.base import Instance

ROUNDS = 60


def replica(number: int, *, pool: int = 0, revision: str = "a", ready: bool = True, **fields: Any) -> InstanceState:
    """fields: hang_reason and so on."""
    instance = Instance(id=f"r{number}", role="replica", revision=revision, pool=pool, url="", pid=1, started_at=0.0)
    return InstanceState(instance=instance, ready_s=0.0 if ready else None, is_healthy=True, **fields)


def replicas(count: int, revision: str = "a") -> list[InstanceState]:
    return [replica(number, revision=revision) for number in range(1, count + 1)]


def actions_for(desired: DesiredReplicas, existing: list[InstanceState]) -> Actions:
    return next_actions(desired, existing, now_s=0.0)


@dataclass
class World:
    """Replicas that become ready, drain and exit as time passes, and that may crash. It checks every action."""

    replicas: list[InstanceState] = field(default_factory=list)
    started: int = 0

    def serving(self) -> int:
        return sum(one.is_serving and not one.is_draining for one in self.replicas)

    def step(self, desired: DesiredReplicas) -> None:
        before = self.serving()
        actions = actions_for(desired, self.replicas)
        stopped = [one for one in self.replicas if one.id in actions.stop]
        drained = all(one.phase == "starting" or (one.is_draining and one.is_idle) for one in stopped)
        assert drained, "requests would be cut off"
        for pool in actions.start:
            self.started += 1
            self.replicas.append(replica(self.started, pool=pool, revision=desired.revisions[pool], ready=False))
        for one in self.replicas:
            is_stopping = one.phase == "stopping" or one.id in (*actions.stop, *actions.kill)
            one.instance = replace(one.instance, stopping=is_stopping)
            one.draining_s = 0.0 if one.id in actions.drain else None
            one.is_idle = False
        assert not actions.start or len(self.replicas) <= desired.total + desired.max_surge
        min_serving = desired.total - (0 if desired.max_surge else 1) - sum(one.is_cordoned for one in self.replicas)
        assert self.serving() >= min(before, min_serving)

    def time_passes(self) -> None:
        """Starting replicas become ready, draining ones idle, stopping ones exit."""
        self.replicas = [one for one in self.replicas if one.phase != "stopping"]
        for one in self.replicas:
            one.ready_s, one.is_idle = 0.0, one.is_draining

    def settle(self, desired: DesiredReplicas) -> None:
        for _ in range(ROUNDS):
            self.step(desired)
            self.time_passes()

    def is_as_desired(self, desired: DesiredReplicas) -> bool:
        found = Counter(
            (one.pool, one.revision) for one in self.replicas if one.phase == "ready" and not one.is_draining
        )
        counts = enumerate(zip(desired.counts, desired.revisions, strict=True))
        return found == Counter({(pool, revision): count for pool, (count, revision) in counts if count})


@st.composite
def desired_replicas(draw: st.DrawFn) -> DesiredReplicas:
    counts = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
    revisions = tuple(draw(st.sampled_from(["a", "b"])) + str(pool) for pool in range(len(counts)))
    return DesiredReplicas(counts=counts, revisions=revisions, max_surge=draw(st.sampled_from([0, 1])))


EVENTS = st.lists(st.sampled_from(["pass", "crash", "hang", "none"]), max_size=12)


@settings(max_examples=300)
@given(st.lists(st.tuples(desired_replicas(), EVENTS), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_converges_after_crashes_hangs_and_spec_changes(changes: list, random) -> None:
    world = World()
    for desired, events in changes:
        for event in events:
            world.step(desired)
            if event == "pass":
                world.time_passes()
            elif world.replicas and event in ("crash", "hang"):
                victim = random.choice(world.replicas)
                if event == "crash":
                    world.replicas.remove(victim)
                else:
                    victim.hang_reason = "it hangs"
    last, _ = changes[-1]
    world.settle(last)
    assert world.is_as_desired(last)
    started = world.started
    world.settle(last)
    assert world.started == started, "replicas that are as desired are left alone"


def test_a_changed_plan_replaces_one_at_a_time() -> None:
    world, desired = World(replicas(3), started=3), DesiredReplicas(counts=(3,), revisions=("b",), max_surge=1)
    max_draining = 0
    for _ in range(ROUNDS):
        world.step(desired)
        max_draining = max(max_draining, sum(one.is_draining for one in world.replicas))
        world.time_passes()
    assert max_draining == 1
    assert world.is_as_desired(desired)
    assert world.started == 6


def test_a_new_release_that_never_becomes_ready_costs_no_old_replica() -> None:
    world, desired = World(replicas(2), started=2), DesiredReplicas(counts=(2,), revisions=("b",), max_surge=1)
    for _ in range(ROUNDS):
        world.step(desired)
        world.replicas = [one for one in world.replicas if one.revision == "a"]  # the new one crashed
    assert [one.is_serving and not one.is_draining for one in world.replicas] == [True, True]


def test_without_surge_an_old_replica_goes_first() -> None:
    actions = actions_for(DesiredReplicas(counts=(1,), revisions=("b",), max_surge=0), replicas(1))
    assert (actions.start, actions.drain) == ((), {"r1"})


def test_scaling_down_drains_the_newest() -> None:
    actions = actions_for(DesiredReplicas(counts=(1,), revisions=("a",)), replicas(3))
    assert actions.drain == {"r2", "r3"}
    assert actions.stop == ()


def test_a_cordoned_replica_is_not_replaced() -> None:
    existing = [replica(1, is_cordoned=True), replica(2)]
    actions = actions_for(DesiredReplicas(counts=(2,), revisions=("a",)), existing)
    assert (actions.start, actions.drain, actions.stop) == ((), {"r1"}, ())


def test_a_hung_replica_is_killed_and_replaced() -> None:
    existing = [replica(1, hang_reason="it hangs"), replica(2)]
    actions = actions_for(DesiredReplicas(counts=(2,), revisions=("a",)), existing)
    assert (actions.kill, actions.start) == (("r1",), (0,))


def test_a_replica_to_replace_is_drained_once_another_serves() -> None:
    existing = [replica(1, pending_replacement=True), replica(2)]
    desired = DesiredReplicas(counts=(2,), revisions=("a",))
    actions = actions_for(desired, existing)
    assert (actions.start, actions.drain) == ((0,), frozenset())
    assert actions_for(desired, [*existing, replica(3)]).drain == {"r1"}


def test_a_draining_replica_serves_again_if_its_successor_crashes() -> None:
    old, new = replicas(2), replica(3, revision="b")
    desired = DesiredReplicas(counts=(2,), revisions=("b",))
    assert actions_for(desired, [*old, new]).drain == {"r1"}
    old[0].draining_s = 0.0
    assert actions_for(desired, old).drain == frozenset()  # the new one crashed


def test_a_drained_replica_is_stopped_when_it_is_idle_or_after_the_timeout() -> None:
    existing = [replica(1), replica(2)]
    existing[0].draining_s = 0.0
    desired = DesiredReplicas(counts=(1,), revisions=("a",), drain_timeout_s=60.0)
    assert next_actions(desired, existing, now_s=59.0).stop == ()
    assert next_actions(desired, existing, now_s=61.0).stop == ("r1",)
    existing[0].is_idle = True
    assert next_actions(desired, existing, now_s=1.0).stop == ("r1",)
