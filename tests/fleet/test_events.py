"""Events: what happened to a service's processes stays readable, in words that operators know from Kubernetes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fleet_for_tests import play_in, release

from powerband.cli.main import main
from powerband.fleet.monitor.events import MAX_EVENTS, Event, Events, read_events
from powerband.fleet.report.events_table import event_rows
from powerband.fleet.service.store import ServiceStore
from powerband.fleet.targets.base import ExitedInstance, InstanceSpec
from powerband.fleet.targets.local import LocalTarget
from powerband.fleet.targets.processes import oom_kills

LOG = "INFO a line\nerror: Cannot listen on 127.0.0.1 port 8000.\nhint:  Choose another.\n"


def reasons(events: Events) -> list[tuple[str, str]]:
    return [(event.reason, event.subject) for event in events.all]


@pytest.mark.parametrize(
    ("exited", "reason", "message", "code", "signal_name"),
    [
        (ExitedInstance("r1", -signal.SIGKILL, LOG), "Error", "killed by SIGKILL (exit code 137)", 137, "SIGKILL"),
        (ExitedInstance("r1", -signal.SIGSEGV, ""), "Error", "killed by SIGSEGV (exit code 139)", 139, "SIGSEGV"),
        (ExitedInstance("r1", 3, LOG), "Error", "exit code 3: error: Cannot listen on 127.0.0.1 port 8000.", 3, ""),
        (ExitedInstance("r1", 1, "Traceback\nKeyError: 1"), "Error", "exit code 1: KeyError: 1", 1, ""),
        (
            ExitedInstance("r1", -signal.SIGKILL, "", oom_killed=True),
            *("OOMKilled", "killed by the kernel: out of memory", 137, "SIGKILL"),
        ),
        (ExitedInstance("r1", None, "", after_reboot=True), "Rebooted", "the machine was restarted", None, ""),
    ],
)
def test_crash_has_a_reason_and_an_exit_code(
    exited: ExitedInstance, reason: str, message: str, code: int | None, signal_name: str
) -> None:
    event = Events().record_exit(exited, was_ready=True)
    assert (event.type, event.subject, event.reason, event.message) == ("Warning", "r1", reason, message)
    assert (event.exit_code, event.signal) == (code, signal_name)


def test_exit_that_was_asked_for_is_no_warning() -> None:
    event = Events().record_exit(ExitedInstance("r1", 0, "", exit_expected=True), was_ready=True, was_asked=True)
    assert (event.type, event.reason, event.message) == ("Normal", "Stopped", "exit code 0")


def test_failing_starts_are_counted_and_crashes_of_ready_replicas_are_kept_apart() -> None:
    events = Events()
    for number in (1, 2, 3):
        events.record_exit(ExitedInstance(f"r{number}", 1, "no memory"), was_ready=False)
    assert [(one.subject, one.count) for one in events.all] == [("r3", 3)]
    for number in (4, 5):
        events.record_exit(ExitedInstance(f"r{number}", -9, ""), was_ready=True)
    assert [(one.subject, one.count) for one in events.all] == [("r3", 3), ("r4", 1), ("r5", 1)]


def test_an_engine_that_its_replica_restarts_is_an_event_with_reason_and_exit_code(tmp_path: Path) -> None:
    play = play_in(tmp_path / "demo")
    play.desire(release(1))
    play.settle()
    (replica,) = play.world.replicas()
    replica.engine_restarts = 1
    play.settle()
    found = [one for one in play.controller.events.all if one.reason == "EngineRestarted"]
    assert [(one.type, one.subject, one.exit_code, one.count) for one in found] == [
        ("Warning", replica.instance.id, 137, 1)
    ]
    assert found[0].message == "The engine's process was killed by SIGKILL while serving."


def test_every_start_of_the_gateway_has_one_name() -> None:
    events = Events()
    for number in (1, 4):
        events.record("Ready", f"gateway-{number}", "after 1.0 s")
        events.record_exit(ExitedInstance(f"gateway-{number}", -9, ""), was_ready=True)
    assert {event.subject for event in events.all} == {"gateway"}


def test_events_survive_a_restart_of_the_controller_and_are_limited(tmp_path: Path) -> None:
    path = tmp_path / "events.json"
    Events(path).record("Ready", "r1", "after 1.0 s")
    events = Events(path)
    assert reasons(events) == [("Ready", "r1")]
    for number in range(MAX_EVENTS + 5):
        events.record("Ready", f"r{number}", f"after {number} s")
    assert len(read_events(path)) == MAX_EVENTS
    path.write_bytes(b"[{")
    assert read_events(path) == ()


def test_table_shows_when_how_often_and_why() -> None:
    event = Event(reason="BackOff", subject="r1", message="it\nwaits", count=5, first_seen=0.0, last_seen=60.0)
    assert event_rows([event], now_s=63.0)[1] == ("3 s ago (x5 in 60 s)", "Normal", "BackOff", "r1", "it�waits")


def test_controller_records_what_happens_to_replicas(tmp_path: Path) -> None:
    play = play_in(tmp_path)
    play.desire(release(2))
    play.settle()
    play.world.die("r1")
    play.settle()
    events = play.controller.events
    assert ("Error", "r1") in reasons(events)
    found = next(event for event in events.all if event.reason == "Error")
    assert (found.exit_code, found.signal, found.type) == (137, "SIGKILL", "Warning")
    assert any("r1 crashed: killed by SIGKILL" in text for text in play.status().incidents)
    play.desire(release(1))
    play.settle()
    assert ("Scaled", play.world.store.name) in reasons(events)
    assert "Stopped" in {reason for reason, _ in reasons(events)}
    assert "Killing" not in {reason for reason, _ in reasons(events)}


def test_killing_of_a_hung_replica_says_why_and_is_no_crash(tmp_path: Path) -> None:
    play = play_in(tmp_path)
    play.desire(release(1))
    play.settle()
    [life] = play.world.replicas()
    life.silent = True
    play.settle()
    events = [event for event in play.controller.events.all if event.subject == life.instance.id]
    killing = [event.message for event in events if event.reason == "Killing"]
    assert killing == ["it hangs: no response to its probes for 6 s"]
    assert not [event for event in events if event.reason == "Error"]


def test_new_controller_records_the_crash_that_no_controller_saw(tmp_path: Path) -> None:
    play = play_in(tmp_path)
    play.desire(release(1))
    play.settle()
    generation = play.status().generation
    play.world.die("r1")
    play.new_controller()
    play.settle()
    events = play.controller.events
    assert ("Error", "r1") in reasons(events)
    assert play.status().generation == generation
    assert "Deployed" not in {reason for reason, _ in reasons(events)}, "nothing else was desired"


def test_rollout_that_fails_is_an_event(tmp_path: Path) -> None:
    play = play_in(tmp_path)
    play.world.broken.add("b")
    play.desire(release(1, command="b"))
    play.settle()
    assert ("FailedRollout", play.world.store.name) in reasons(play.controller.events)


def start_sleeper(target: LocalTarget) -> int:
    command = (sys.executable, "-c", "import time; time.sleep(60)")
    return target.start(InstanceSpec(id="r1", role="replica", revision="a", command=command)).pid


def exited_of(target: LocalTarget) -> ExitedInstance:
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s:
        target.list_instances()
        if found := target.take_exited():
            return found[0]
    raise AssertionError("it took too long")


@pytest.mark.parametrize("kills", [0, 1])
def test_kill_while_the_kernel_counts_an_oom_kill_is_one(
    tmp_path: Path, kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = [7]
    monkeypatch.setattr("powerband.fleet.targets.local.oom_kills", lambda: count[0])
    target = LocalTarget(tmp_path)
    pid = start_sleeper(target)
    target.list_instances()
    count[0] += kills
    subprocess.run(["kill", "-KILL", str(pid)], check=True)
    exited = exited_of(target)
    assert (exited.exit_code, exited.oom_killed) == (-signal.SIGKILL, bool(kills))


def test_oom_kills_are_those_of_the_container_and_of_the_machine(tmp_path: Path) -> None:
    assert oom_kills(tmp_path) == 0, "a system that does not count them"
    for path, text in {
        "proc/self/cgroup": "4:memory:/x\n0::/pod/me\n",
        "proc/vmstat": "oom_kill_x 9\noom_kill 2\n",
        "sys/fs/cgroup/pod/me/memory.events": "oom 4\noom_kill 3\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert oom_kills(tmp_path) == 5


def test_command_prints_events_as_a_table_and_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POWERBAND_STATE", str(tmp_path))
    assert main(["events"]) == 3
    assert "No service is deployed." in capsys.readouterr().err
    play = play_in(tmp_path / "demo")
    play.desire(release(1))
    Events(ServiceStore.named("demo").events).record_exit(ExitedInstance("r1", -9, ""), was_ready=True)
    for arguments in (["events"], ["events", "demo"], ["events", "--name", "demo"]):
        assert main(arguments) == 0
        assert "killed by SIGKILL" in capsys.readouterr().out
    assert main(["events", "demo", "--json"]) == 0
    [shown] = json.loads(capsys.readouterr().out)
    assert (shown["reason"], shown["exit_code"], shown["signal"], shown["count"]) == ("Error", 137, "SIGKILL", 1)
