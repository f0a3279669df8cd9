"""How commands name a service, what they say of one that is not there or does not run, and what Ctrl-C leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from fleet_for_tests import Play, play_in, release
from test_service import plan_file

from powerband.cli.main import main
from powerband.errors import EnvironmentFault, UsageError
from powerband.fleet import operations
from powerband.fleet.deployment import DeploymentOptions, deploy_plan
from powerband.fleet.report import status_table
from powerband.fleet.report.status_table import is_serving, read_observed_status, status_lines
from powerband.fleet.scaling import keep_scaled
from powerband.fleet.service.spec import GatewaySpec, Policy, Release
from powerband.fleet.service.store import ServiceStore
from powerband.fleet.targets.base import InstanceSpec
from powerband.fleet.targets.local import LocalTarget
from powerband.spec.plan import read_plan

OLD = ("--name", "--service")
NAMING = [
    *(["scale", "nope", "2"], ["scale", "2", "OLD", "nope"], ["scale", "nope", "0=2", "1=1"]),
    *(["drain", "nope", "r1"], ["drain", "r1", "OLD", "nope"]),
    *(["logs", "nope", "r1"], ["logs", "r1", "OLD", "nope"], ["logs", "OLD", "nope"]),
    *(["events", "nope"], ["events", "OLD", "nope"]),
    *(["incidents", "nope"], ["incidents", "OLD", "nope"]),
    *(["remove", "nope"], ["remove", "OLD", "nope"], ["remove", "nope", "demo"]),
    *(["usage", "nope"], ["usage", "OLD", "nope"]),
    *(["audit", "nope"], ["audit", "OLD", "nope"]),
    *(["keys", "list", "nope"], ["keys", "list", "OLD", "nope"]),
    *(["keys", "create", "nope", "app"], ["keys", "create", "app", "OLD", "nope"]),
    *(["keys", "revoke", "nope", "app"], ["keys", "revoke", "app", "OLD", "nope"]),
    *(["keys", "limit", "nope", "app", "--usd", "1"], ["keys", "limit", "app", "OLD", "nope", "--usd", "1"]),
]


class Silent:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, _status: object) -> None:
        return

    def describe(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POWERBAND_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def demo(state: Path) -> Play:
    """A service that its controller has seen ready; no process of it runs."""
    play = play_in(state / "demo")
    play.desire(release(1))
    play.settle()
    return play


@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("command", NAMING, ids=" ".join)
def test_every_command_takes_the_service_as_its_first_argument_or_by_the_old_flag(
    command: list[str], old: str, demo: Play, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([old if word == "OLD" else word for word in command]) == 3
    assert "There is no service 'nope'.\nhint:  Deployed: demo." in capsys.readouterr().err


def test_several_services_are_named_with_an_example_that_works(
    state: Path, demo: Play, capsys: pytest.CaptureFixture[str]
) -> None:
    play_in(state / "other").desire(release(1))
    assert main(["events"]) == 2
    said = capsys.readouterr().err
    assert "There are several services: demo, other." in said
    example = said.partition("as in '")[2].partition("'")[0]
    assert main(example.split()[1:]) in (0, 3)
    assert "demo" in capsys.readouterr().out


def test_two_names_for_a_service_are_refused(demo: Play, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["events", "demo", "--name", "other"]) == 2
    assert "Two services are named" in capsys.readouterr().err


def test_one_word_for_logs_is_a_service_or_a_process(demo: Play, capsys: pytest.CaptureFixture[str]) -> None:
    logs = demo.world.store.logs
    for name in ("r1", "controller"):
        (logs / f"{name}.log").write_text(f"of {name}\n")
    for arguments in (["r1"], ["demo", "r1"], ["r1", "--name", "demo"]):
        assert main(["logs", *arguments]) == 0
        assert capsys.readouterr().out == "of r1\n"
    assert main(["logs", "demo"]) == 0
    assert "of controller" in capsys.readouterr().out
    assert main(["logs", "demo", "r9"]) == 2
    assert "There is no log of 'r9'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "events", "logs", "incidents", "usage", "remove", "keys list"])
def test_without_a_service_every_command_says_so_alike(
    command: str, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, problem in (([], "No service is deployed."), (["demo"], "There is no service 'demo'.")):
        if command == "logs" and words:
            continue  # one word for logs may be a process
        assert main([*command.split(), *words]) == 3
        said = capsys.readouterr()
        assert (said.out, said.err.splitlines()[0]) == ("", f"error: {problem}")
        assert "'powerband deploy PLAN' starts one." in said.err


def test_status_without_a_service_is_null_for_programs(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--json"]) == 3
    assert json.loads(capsys.readouterr().out) is None


def test_status_after_a_reboot_shows_nothing_as_ready(demo: Play, capsys: pytest.CaptureFixture[str]) -> None:
    store = demo.world.store
    assert demo.status().phase == "ready", "in the file"
    assert main(["status"]) == 3
    said = capsys.readouterr().out
    assert "  ready" not in said
    assert "down: none of its processes runs" in said
    assert "'powerband deploy' starts it again" in said
    assert main(["status", "--json"]) == 3
    shown = json.loads(capsys.readouterr().out)["status"]
    assert (shown["phase"], shown["gateway"]["state"], shown["gateway"]["pid"]) == ("down", "down", 0)
    assert [(one["state"], one["pid"], one["ready_at"]) for one in shown["replicas"]] == [("exited", 0, None)]
    assert not is_serving(store)


def test_status_tells_replicas_that_run_from_those_whose_pid_is_another_process(state: Path) -> None:
    """The controller is gone, r1 still runs, and r2's pid now belongs to another process."""
    play = play_in(state / "demo")
    play.desire(release(2))
    play.settle()
    target = LocalTarget(play.world.store.path)
    command = (sys.executable, "-c", "import time; time.sleep(60)")
    first, second = [
        target.start(InstanceSpec(id=id, role="replica", revision="a", command=command)) for id in ("r1", "r2")
    ]
    try:
        record = play.world.store.path / "members" / "r2.json"
        changed = json.loads(record.read_text())
        changed["process"]["started"] -= 100_000
        record.write_text(json.dumps(changed))
        status = read_observed_status(play.world.store)
        assert status is not None
        assert {one.id: one.state for one in status.replicas} == {"r1": "ready", "r2": "exited"}
        assert status.phase == "degraded"
    finally:
        for instance in (first, second):
            os.kill(instance.pid, 9)


def test_status_says_why_the_gateways_figures_cannot_be_read(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play = play_in(state / "demo")
    plan = {"slo": {"ttft_s": 1.0}, "promise": {"rate": 1.0}}
    play.desire(msgspec.structs.replace(release(1), plan=plan))
    play.settle()
    play.controller.gateway.error = "Cannot read the gateway's requests and routes: no response"
    play.tick()
    monkeypatch.setattr(status_table, "read_observed_status", lambda _: play.status())
    desired = play.world.store.read_spec()
    assert desired is not None
    assert any("Cannot read the gateway's requests" in line for line in status_lines(play.world.store, desired))


def planned(*counts: int, now: tuple[int, ...] | None = None) -> Release:
    """A release of a plan with these replicas, of which there are `now`."""
    made = release(*counts)
    plan = {**made.plan, "deployment": {"pools": [{"count": count} for count in counts]}}
    return msgspec.structs.replace(made, plan=plan).with_counts(now or counts)


@pytest.mark.parametrize(
    ("new", "current", "reset", "counts", "note"),
    [
        (planned(1), None, False, (1,), ""),
        (planned(1), planned(1), False, (1,), ""),
        (planned(1), planned(1, now=(3,)), False, (3,), "keeping the 3 replicas of 'powerband scale'; the plan has 1"),
        (planned(1), planned(1, now=(3,)), True, (1,), "1 replica as planned (--reset-replicas)"),
        (planned(1, 2), planned(1, 2, now=(4, 1)), False, (4, 1), "keeping the 5 replicas (4 + 1)"),
        (planned(4), planned(1, now=(2,)), False, (4,), "4 replicas as planned (another number than the plan before)"),
        (planned(2), planned(1, now=(2,)), False, (2,), ""),
        (planned(1, 1), planned(1, now=(3,)), False, (1, 1), "another number than the plan before"),
    ],
)
def test_new_plan_keeps_a_number_of_replicas_that_was_set_by_scale(
    new: Release, current: Release | None, reset: bool, counts: tuple[int, ...], note: str
) -> None:
    made, said = keep_scaled(new, current, reset=reset)
    assert made.counts == counts
    assert said.startswith(note) if note.startswith(("1", "4", "keep")) else note in said
    assert bool(note) == bool(said)


def options(name: str) -> DeploymentOptions:
    gateway = GatewaySpec(host="127.0.0.1", port=1, auth="keys")
    return DeploymentOptions(store=ServiceStore.named(name), gateway=gateway, policy=Policy(), served_name="demo")


def test_deploy_that_is_refused_leaves_no_folder(state: Path, tmp_path: Path) -> None:
    path = Path(plan_file(tmp_path / "plan.yaml"))
    path.write_text(path.read_text().replace("device: cpu", "device: H100"))
    plan = read_plan(path)
    with pytest.raises(UsageError, match="this machine has"):
        deploy_plan(plan, options("rag"), Silent())
    assert not (state / "rag").exists()


def test_deploy_whose_controller_does_not_start_leaves_no_folder(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_store: ServiceStore) -> bool:
        raise EnvironmentFault("The controller did not start.")

    monkeypatch.setattr("powerband.fleet.deployment.ensure_controller", fail)
    plan = read_plan(Path(plan_file(tmp_path / "plan.yaml")))
    with pytest.raises(EnvironmentFault):
        deploy_plan(plan, options("rag"), Silent())
    assert not (state / "rag").exists()


def test_interrupted_deploy_says_what_goes_on_and_how_to_stop_it(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("powerband.fleet.deployment.ensure_controller", lambda _store: True)
    monkeypatch.setattr(operations, "wait_for", interrupt)
    assert main(["deploy", plan_file(tmp_path / "plan.yaml"), "--name", "rag"]) == 130
    said = capsys.readouterr().err
    assert "error: interrupted" in said
    assert "rag goes on: it was being started. 'powerband status rag --watch' shows it" in said
    assert "'powerband remove rag' stops it" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--name Foo", "Invalid service name 'Foo'"),
        ("--auth open --host 0.0.0.0", "without keys"),
        ("--port 99999", "port is 99999"),
        ("--max-surge 3", "max_surge is 3"),
        ("--drain-timeout x", "drain_timeout"),
        ("--gateway-args --foo", "gateway-args"),
        ("--threads 0", "threads is 0"),
        ("--verify-seconds 1", "verify_seconds is 1"),
        ("--webhook x", "webhook"),
        ("--report /no/x.html", "Cannot write /no/x.html"),
    ],
)
def test_options_of_deploy_are_checked_before_a_plan_is_searched_for(
    flags: str, message: str, state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POWERBAND_DEVICE_PROFILE", str(state / "none.yaml"))
    assert main(["deploy", "demo", "--rate", "1", *flags.split()]) in (2, 3)
    said = capsys.readouterr().err
    assert message in said
    assert "measured" not in said


def test_interrupted_command_of_which_nothing_goes_on_says_no_more() -> None:
    code = """
import powerband.cli.main as m
def interrupt(_): raise KeyboardInterrupt
m._run = interrupt
print(m.main([]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("130\n", "error: interrupted\n")
