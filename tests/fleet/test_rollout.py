"""Moves of a rollout in a world that checks them: never too many replicas, never too few ready, always an end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from powerband.fleet.control.rollout import Actions, DesiredReplicas, ReplicaView, next_actions

ROUNDS = 60


@dataclass
class World:
    """Replicas that become ready, drain and end in time, and that may die. It checks what every move does."""

    members: list[ReplicaView] = field(default_factory=list)
    started: int = 0
    moved: Actions = field(default_factory=Actions)

    def serving(self) -> int:
        return sum(member.serves and not member.draining for member in self.members)

    def step(self, want: DesiredReplicas) -> None:
        before = self.serving()
        moves = self.moved = next_actions(want, self.members)
        ending = [member for member in self.members if member.id in moves.stop]
        assert all(m.state == "starting" or (m.draining and m.empty) for m in ending), "requests would be cut off"
        for pool in moves.start:
            self.started += 1
            revision = want.revisions[pool]
            self.members.append(ReplicaView(id=f"r{self.started}", number=self.started, pool=pool, revision=revision))
        self.members = [
            replace(
                member,
                state="stopping" if member.id in {*moves.stop, *moves.kill} else member.state,
                draining=member.id in moves.drain,
                empty=False,
            )
            for member in self.members
        ]
        grown = len(moves.start) > 0
        assert not grown or len(self.members) <= want.total + want.surge
        least = want.total - (0 if want.surge else 1) - sum(member.set_aside for member in self.members)
        assert self.serving() >= min(before, least)

    def time_passes(self) -> None:
        """What starts is ready, what drains is empty, what stops is gone."""
        self.members = [
            replace(member, state="ready" if member.state == "starting" else member.state, empty=member.draining)
            for member in self.members
            if member.state != "stopping"
        ]

    def settle(self, want: DesiredReplicas) -> None:
        for _ in range(ROUNDS):
            self.step(want)
            self.time_passes()

    def is_whole(self, want: DesiredReplicas) -> bool:
        found = Counter((m.pool, m.revision) for m in self.members if m.state == "ready" and not m.draining)
        asked = {
            (pool, revision): count
            for pool, (count, revision) in enumerate(zip(want.counts, want.revisions, strict=True))
        }
        return found == Counter({key: count for key, count in asked.items() if count})


@st.composite
def wants(draw: st.DrawFn) -> DesiredReplicas:
    counts = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
    revisions = tuple(draw(st.sampled_from(["a", "b"])) + str(pool) for pool in range(len(counts)))
    return DesiredReplicas(counts=counts, revisions=revisions, surge=draw(st.sampled_from([0, 1])))


EVENTS = st.lists(st.sampled_from(["pass", "die", "hang", "none"]), max_size=12)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(wants(), EVENTS), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_whatever_is_wanted_and_dies_meanwhile_it_ends_with_what_is_wanted(plan: list, random) -> None:
    world = World()
    for want, events in plan:
        for event in events:
            world.step(want)
            if event == "pass":
                world.time_passes()
            elif world.members and event in ("die", "hang"):
                victim = random.choice(world.members)
                world.members.remove(victim)
                if event == "hang":
                    world.members.append(replace(victim, hung=True))
    world.settle(plan[-1][0])
    assert world.is_whole(plan[-1][0])
    count = world.started
    world.settle(plan[-1][0])
    assert world.started == count, "what is as it should be is left alone"


def replicas(count: int, revision: str = "a", **fields: object) -> list[ReplicaView]:
    return [
        ReplicaView(id=f"r{n}", number=n, pool=0, revision=revision, state="ready", **fields)  # type: ignore[arg-type] # bools
        for n in range(1, count + 1)
    ]


def test_a_changed_plan_replaces_one_at_a_time() -> None:
    world, want = World(replicas(3), started=3), DesiredReplicas(counts=(3,), revisions=("b",), surge=1)
    most_draining = 0
    for _ in range(ROUNDS):
        world.step(want)
        most_draining = max(most_draining, sum(member.draining for member in world.members))
        world.time_passes()
    assert most_draining == 1
    assert world.is_whole(want)
    assert world.started == 6


def test_a_new_release_that_never_is_ready_costs_no_old_replica() -> None:
    world, want = World(replicas(2), started=2), DesiredReplicas(counts=(2,), revisions=("b",), surge=1)
    for _ in range(ROUNDS):
        world.step(want)
        world.members = [member for member in world.members if member.revision == "a"]  # the new one died
    assert [member.serves and not member.draining for member in world.members] == [True, True]


def test_where_there_is_no_room_the_old_one_goes_first() -> None:
    want = DesiredReplicas(counts=(1,), revisions=("b",), surge=0)
    moves = next_actions(want, replicas(1))
    assert (moves.start, moves.drain) == ((), {"r1"})


def test_fewer_replicas_drain_the_newest() -> None:
    moves = next_actions(DesiredReplicas(counts=(1,), revisions=("a",)), replicas(3))
    assert moves.drain == {"r2", "r3"}
    assert moves.stop == ()


def test_a_replica_that_a_user_set_aside_is_not_replaced() -> None:
    members = replicas(2)
    members[0] = replace(members[0], set_aside=True)
    moves = next_actions(DesiredReplicas(counts=(2,), revisions=("a",)), members)
    assert (moves.start, moves.drain, moves.stop) == ((), {"r1"}, ())


def test_what_hangs_is_killed_and_its_place_filled() -> None:
    members = replicas(2)
    members[0] = replace(members[0], hung=True)
    moves = next_actions(DesiredReplicas(counts=(2,), revisions=("a",)), members)
    assert (moves.kill, moves.start) == (("r1",), (0,))


def test_a_draining_replica_is_needed_again_when_another_dies() -> None:
    old, new = replicas(2), ReplicaView(id="r3", number=3, pool=0, revision="b", state="ready")
    want = DesiredReplicas(counts=(2,), revisions=("b",))
    drained = next_actions(want, [*old, new]).drain
    assert drained == {"r1"}
    left = [replace(old[0], draining=True), old[1]]  # the new one died
    assert next_actions(want, left).drain == frozenset()
