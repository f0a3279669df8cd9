"""The controller in a world without processes: crashes, hangs, rollouts, rollbacks, and changes of controllers."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from fleet_for_tests import Play, play_in, release
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


@pytest.fixture
def play(tmp_path: Path) -> Play:
    made = play_in(tmp_path / "demo")
    made.desire(release(2))
    made.settle(10)
    return made


def ids(play: Play) -> list[str]:
    return sorted(life.instance.id for life in play.world.replicas())


def test_starts_replicas_and_gateway_and_then_changes_nothing(play: Play) -> None:
    assert play.is_as_desired()
    assert play.status().phase == "ready"
    assert play.status().last_ready_generation == 1
    before = ids(play)
    play.settle()
    assert ids(play) == before


def test_replaces_a_crashed_replica_in_the_next_tick(play: Play) -> None:
    dead = ids(play)[0]
    play.world.die(dead)
    play.tick()
    assert len(ids(play)) == 2
    assert dead not in ids(play)
    assert play.status().phase == "degraded"
    assert sorted(one.restarts for one in play.settle(5).replicas) == [0, 1]


def test_kills_and_replaces_a_hung_replica(play: Play) -> None:
    silent = ids(play)[0]
    play.world.lives[silent].silent = True
    status = play.settle(20)
    assert silent not in ids(play)
    assert play.is_as_desired()
    assert sorted(one.restarts for one in status.replicas) == [0, 1]


def test_backs_off_from_a_replica_that_keeps_crashing_and_status_shows_it(play: Play) -> None:
    for _ in range(40):  # 20 seconds
        for id in ids(play)[:1]:
            play.world.die(id)
        play.tick()
        play.world.pass_time(0.5)
    assert play.world.started < 2 + 16
    assert any("times in a row" in note for note in play.status().notes)


def test_restarts_a_crashed_gateway_and_leaves_replicas_alone(play: Play) -> None:
    before = ids(play)
    gateway = next(id for id, life in play.world.lives.items() if life.instance.role == "gateway")
    play.world.die(gateway)
    status = play.settle(5)
    assert status.gateway.state == "ready"
    assert status.gateway.restarts == 1
    assert ids(play) == before


def test_a_new_controller_recovers_running_replicas(play: Play) -> None:
    before = ids(play)
    play.new_controller()
    play.tick()
    play.tick()
    assert play.status().phase == "ready"
    play.settle()
    assert ids(play) == before


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 64, b'{"phase": 1}', b"\xb3"], ids=["empty", "zeros", "other", "no UTF-8"]
)
def test_a_new_controller_goes_on_without_a_status_that_is_damaged(play: Play, content: bytes) -> None:
    before, path = ids(play), play.world.store.path / "status.json"
    path.write_bytes(content)
    play.new_controller()
    play.settle(10)
    assert play.status().phase == "ready"
    assert ids(play) == before, "what runs is observed again"
    assert path.with_name("status.json.damaged").read_bytes() == content


def test_a_damaged_desired_state_is_replaced_by_the_one_that_the_controller_has_read(play: Play) -> None:
    path = play.world.store.path / "desired.json"
    before = path.read_bytes()
    path.write_bytes(b"")
    play.world.die(gateway_of(play))
    play.settle(10)
    assert play.status().phase == "ready"
    assert path.read_bytes() == before
    assert path.with_name("desired.json.damaged").exists()


def test_replaces_a_replica_that_crashed_while_no_controller_ran(play: Play) -> None:
    play.world.die(ids(play)[0])
    play.world.die(gateway_of(play))
    play.new_controller()
    status = play.settle(5)
    assert play.is_as_desired()
    assert [one.restarts for one in status.replicas] == [0, 1], "it counts as a restart, whoever was there to see it"
    assert status.gateway.restarts == 1


def gateway_of(play: Play) -> str:
    (found,) = [id for id, life in play.world.lives.items() if life.instance.role == "gateway"]
    return found


def test_kills_a_hung_gateway_within_seconds_also_after_a_change_of_controllers(play: Play) -> None:
    hung = gateway_of(play)
    play.world.lives[hung].silent = True
    play.new_controller()
    status = play.settle(20)
    assert gateway_of(play) != hung
    assert status.phase == "ready"


def test_gives_a_gateway_that_never_responded_half_a_minute(play: Play) -> None:
    play.world.die(gateway_of(play))
    play.tick()
    mute = gateway_of(play)
    play.world.lives[mute].mute = True
    play.settle(50)
    assert gateway_of(play) == mute
    play.settle(20)
    assert gateway_of(play) != mute


def test_kills_a_replica_that_hangs_while_it_starts_within_seconds(play: Play) -> None:
    play.world.die(ids(play)[0])
    play.tick()
    (starting,) = [id for id in ids(play) if not play.world.lives[id].ready]
    play.world.lives[starting].silent = True
    play.settle(18)
    assert starting not in ids(play)


def test_kills_hung_instances_of_a_removed_service_at_once(play: Play) -> None:
    for life in play.world.lives.values():
        life.silent = True
    play.desire(release(2), removed=True)
    play.settle(16)
    assert not play.world.lives


def test_restarts_a_gateway_within_seconds_however_often_it_crashes(play: Play) -> None:
    for _ in range(8):
        play.settle(4)
        play.world.die(gateway_of(play))
        status = play.settle(6)
        assert status.gateway.state == "ready"


def test_a_rolling_update_cuts_off_no_request(play: Play) -> None:
    for life in play.world.replicas():
        life.inflight = 3
    play.world.max_replicas = 3
    play.desire(release(2, command="b"))
    for _ in range(100):
        play.tick()
        assert play.world.serving() >= 2
        play.world.pass_time(0.5)
        for life in play.world.replicas():
            life.inflight = max(life.inflight - 1, 0)
    assert play.is_as_desired()
    assert play.world.cut_off == 0


def test_cuts_off_requests_after_the_drain_timeout(play: Play) -> None:
    for life in play.world.replicas():
        life.inflight = 1
    play.desire(release(1))
    play.settle(100)
    assert len(ids(play)) == 2
    play.settle(40)
    assert play.is_as_desired()


def test_a_release_that_does_not_start_fails_and_the_old_one_stays(play: Play) -> None:
    before = ids(play)
    play.world.broken.add("b")
    desired = play.desire(release(2, command="b"))
    status = play.settle()
    assert ids(play) == before
    assert status.failed_rollout is not None
    assert status.failed_rollout.generation == desired.generation
    assert "exited before it was ready" in status.failed_rollout.reason
    assert status.failed_rollout.log == "the end of its log"
    assert status.phase == "ready"
    assert play.world.started <= 2 + 2, "two tries"


def test_a_first_release_that_does_not_start_leaves_no_instance(tmp_path: Path) -> None:
    play = play_in(tmp_path / "demo")
    play.world.broken.add("a")
    play.desire(release(2))
    status = play.settle()
    assert status.phase == "failed"
    assert not play.world.lives


def test_removal_stops_the_gateway_before_the_replicas(play: Play) -> None:
    play.desire(release(2), removed=True)
    play.tick()
    stopping = {life.instance.role for life in play.world.lives.values() if life.instance.stopping}
    assert stopping == {"gateway"}
    assert play.settle(10).phase == "removed"
    assert not play.world.lives


def test_a_replica_that_a_user_drained_gets_no_new_requests_and_is_not_replaced(play: Play) -> None:
    first = ids(play)[0]
    play.desire(release(2), drained=(first,))
    status = play.settle()
    assert {one.id: one.state for one in status.replicas}[first] == "drained"
    assert len(status.replicas) == 2
    wanted = play.controller.gateway.desired_route
    assert wanted is not None
    assert [one.id for one in wanted.replicas if one.draining] == [first]


EVENTS = st.one_of(
    st.just(("pass",)),
    st.just(("die",)),
    st.just(("silent",)),
    st.just(("new controller",)),
    st.tuples(st.just("kill in"), st.integers(0, 3)),
    st.tuples(st.just("desire"), st.lists(st.integers(1, 3), min_size=1, max_size=2), st.sampled_from("abx")),
)


@settings(max_examples=25)
@given(st.lists(EVENTS, max_size=25), st.randoms(use_true_random=False))
def test_converges_however_controllers_and_replicas_crash(events: list, random) -> None:
    """Whatever happens between ticks or in the middle of one; the release 'x' never starts."""
    with tempfile.TemporaryDirectory() as path:
        play = play_in(Path(path) / "demo")
        play.world.broken.add("x")
        play.desire(release(2))
        for event in events:
            play.tick()
            victims = [life.instance.id for life in play.world.replicas()]
            if event[0] == "pass":
                play.world.pass_time(1.0)
            elif event[0] == "die" and victims:
                play.world.die(random.choice(victims))
            elif event[0] == "silent" and victims:
                play.world.lives[random.choice(victims)].silent = True
            elif event[0] == "new controller":
                play.new_controller()
            elif event[0] == "kill in":
                play.world.kill_in = event[1]
            elif event[0] == "desire":
                play.desire(release(*event[1], command=event[2]))
        play.desire(release(2, command="b"))
        play.settle(150)
        assert play.is_as_desired(), play.status()
        assert play.status().phase == "ready"
        started = play.world.started
        play.new_controller()
        play.settle(20)
        assert play.world.started == started
