"""The actions that the monitor suggests: carried out where the policy allows it, and recorded with their outcome."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fleet_for_tests import Play, play_in, release

from powerband.fleet.control import remediation
from powerband.fleet.monitor.incidents import ActionKind
from powerband.fleet.monitor.monitor import Action, Monitor
from powerband.fleet.monitor.state import Observation
from powerband.fleet.service.spec import Policy


class SuggestingMonitor(Monitor):
    """Suggests what a test put into `pending`, once."""

    pending: ClassVar[list[Action]] = []
    outcomes: ClassVar[list[str]] = []

    def observe(self, observation: Observation) -> list[Action]:
        super().observe(observation)
        found = list(self.pending)
        self.pending.clear()
        return found

    def record_action(self, action: Action, outcome: str) -> None:
        self.outcomes.append(outcome)


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done about each suggestion."""
    SuggestingMonitor.pending.clear()
    SuggestingMonitor.outcomes.clear()
    monkeypatch.setattr(remediation, "Monitor", SuggestingMonitor)
    return SuggestingMonitor.outcomes


def suggest(kind: ActionKind, replica: str = "") -> None:
    SuggestingMonitor.pending.append(Action(kind=kind, incident="inc-1", reason="It is slow.", replica=replica))


def service(path: Path, *, auto_remediate: bool = True, **fields: Any) -> Play:
    play = play_in(path / "demo")
    policy = Policy(max_surge=1, drain_timeout_s=60.0, start_timeout_s=20.0, auto_remediate=auto_remediate)
    play.desire(release(2, **fields), policy=policy)
    play.settle(10)
    return play


def ids(play: Play) -> Sequence[str]:
    return sorted(life.instance.id for life in play.world.replicas())


def test_a_slow_replica_is_drained_and_replaced(tmp_path: Path, outcomes: list[str]) -> None:
    play = service(tmp_path)
    slow, other = ids(play)
    suggest("eject_replica", slow)
    play.settle(10)
    assert slow not in ids(play)
    assert other in ids(play)
    assert play.is_as_desired()
    assert outcomes == [f"{slow} is being drained and replaced"]
    assert play.world.cut_off == 0


def test_nothing_is_done_unless_the_policy_allows_it(tmp_path: Path, outcomes: list[str]) -> None:
    play = service(tmp_path, auto_remediate=False)
    before = ids(play)
    suggest("eject_replica", before[0])
    play.settle(10)
    assert (ids(play), outcomes) == (before, [])


def test_one_more_replica_is_a_change_of_the_spec_that_can_be_rolled_back(tmp_path: Path, outcomes: list[str]) -> None:
    play = service(tmp_path)
    suggest("add_replica")
    play.settle(10)
    spec = play.world.store.read_spec()
    assert spec is not None
    assert spec.previous is not None
    assert (spec.generation, spec.release.counts, spec.previous.counts) == (2, (3,), (2,))
    assert len(ids(play)) == 3
    assert outcomes == ["one more replica: 3"]


def test_no_replica_is_added_without_free_cores(tmp_path: Path, outcomes: list[str]) -> None:
    play = service(tmp_path, threads=10_000)
    suggest("add_replica")
    play.settle(10)
    assert len(ids(play)) == 2
    assert outcomes == ["could not add replica: All cores of this machine are in use already."]


def test_an_action_for_a_replica_that_has_exited_is_recorded_as_such(tmp_path: Path, outcomes: list[str]) -> None:
    play = service(tmp_path)
    suggest("restart_replica", "r99")
    play.settle(4)
    assert outcomes == ["could not restart replica: r99 has exited."]
