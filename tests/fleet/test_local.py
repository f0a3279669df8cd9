"""Processes as instances: detached, found again, distinguished if a pid is reused, stopped with their children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil
import pytest

from powerband.errors import EnvironmentFault
from powerband.fleet.targets.base import InstanceSpec
from powerband.fleet.targets.local import LocalTarget, _Record
from powerband.fleet.targets.processes import identify

SLEEP = (sys.executable, "-c", "import time; print('here {port}', flush=True); time.sleep(60)")
STUBBORN = (
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(60)",
)
# A child that would outlive it.
PARENT = (
    sys.executable,
    "-c",
    "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
    " process_group=0); print(p.pid, flush=True); time.sleep(60)",
)


def launch(id: str = "r1", command: tuple[str, ...] = SLEEP, **fields: object) -> InstanceSpec:
    return InstanceSpec(id=id, role="replica", revision="a", command=command, **fields)  # type: ignore[arg-type] # of InstanceSpec


@pytest.fixture
def target(tmp_path: Path) -> Iterator[LocalTarget]:
    made = LocalTarget(tmp_path)
    yield made
    for one in made.list_instances():
        made.stop(one.id, 0)
    wait_until(lambda: not made.list_instances())


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, "it took too long"
        time.sleep(0.02)


def said(target: LocalTarget, id: str = "r1") -> str:
    path = target.log(id)
    return path.read_text() if path is not None else ""


def test_an_instance_gets_a_free_port_a_session_and_a_log(target: LocalTarget) -> None:
    running = target.start(launch())
    port = running.url.rpartition(":")[2]
    wait_until(lambda: f"here {port}" in said(target))
    assert os.getsid(running.pid) == running.pid


def test_another_target_lists_the_running_instances(target: LocalTarget, tmp_path: Path) -> None:
    started = target.start(launch(pool=2, devices=(1,)))
    assert list(LocalTarget(tmp_path).list_instances()) == [started]


def test_completes_a_record_that_was_written_before_its_process_started(target: LocalTarget, tmp_path: Path) -> None:
    started = target.start(launch())
    wait_until(lambda: said(target))
    path = tmp_path / "members" / "r1.json"
    record = msgspec.json.decode(path.read_bytes(), type=_Record)
    path.write_bytes(msgspec.json.encode(replace(record, process=None)))
    assert list(LocalTarget(tmp_path).list_instances()) == [started]


def test_deletes_a_record_whose_process_never_started(target: LocalTarget, tmp_path: Path) -> None:
    started = target.start(launch())
    path = tmp_path / "members" / "r1.json"
    record = msgspec.json.decode(path.read_bytes(), type=_Record)
    (tmp_path / "members" / "r2.json").write_bytes(msgspec.json.encode(replace(record, id="r2", process=None)))
    assert [one.id for one in target.list_instances()] == [started.id]


DAMAGE = {
    "another shape": lambda record: record | {"started_at": "of another version"},
    "another id": lambda record: record | {"id": "r2"},
    "no object": lambda record: [record],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_instance_whose_record_cannot_be_decoded_is_ended_reported_and_logged(
    damage: str, target: LocalTarget, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started = target.start(launch(command=PARENT))
    wait_until(lambda: said(target).strip())
    path = tmp_path / "members" / "r1.json"
    content = msgspec.json.encode(DAMAGE[damage](msgspec.json.decode(path.read_bytes())))
    path.write_bytes(content)
    assert list(target.list_instances()) == []
    assert [gone.id for gone in target.take_exited()] == ["r1"]
    for pid in (started.pid, int(said(target))):
        wait_until(lambda pid=pid: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    assert path.with_suffix(".unreadable").read_bytes() == content
    assert "The record of the instance r1 cannot be read" in caplog.text
    assert target.start(launch(command=SLEEP)).id == "r1"


def test_the_records_of_another_service_are_left_as_they_are(tmp_path: Path) -> None:
    one, other = LocalTarget(tmp_path / "one"), LocalTarget(tmp_path / "other")
    running = other.start(launch(devices=(3,)))
    path = tmp_path / "other" / "members" / "r1.json"
    record = msgspec.json.decode(path.read_bytes())
    try:
        for content, devices in ((record | {"process": None}, {3}), (record | {"pool": "x"}, set())):
            path.write_bytes(msgspec.json.encode(content))
            before = path.read_bytes()
            assert one.devices_in_use() == devices
            assert list(one.list_instances()) == []
            assert path.read_bytes() == before
            assert psutil.Process(running.pid).is_running()
    finally:
        path.write_bytes(msgspec.json.encode(record))
        other.stop("r1", 0)
        wait_until(lambda: not other.list_instances())


def test_leaves_another_process_with_a_reused_pid_alone(target: LocalTarget, tmp_path: Path) -> None:
    other = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        identity = identify(other.pid)
        assert identity is not None
        for number, stale in enumerate((replace(identity, started=1), replace(identity, boot="before")), start=1):
            record = _Record(
                id=f"r{number}",
                role="replica",
                revision="a",
                pool=0,
                url="http://127.0.0.1:1",
                started_at=0.0,
                ready_path="/readyz",
                process=stale,
            )
            (tmp_path / "members" / f"r{number}.json").write_bytes(msgspec.json.encode(record))
        assert list(target.list_instances()) == []
        assert [gone.id for gone in target.take_exited()] == ["r1", "r2"]
        assert other.poll() is None, "it belongs to somebody else"
    finally:
        other.kill()
        other.wait()


def test_reports_an_exited_instance_once_with_exit_code_and_log(target: LocalTarget) -> None:
    target.start(launch(command=(sys.executable, "-c", "print('out of memory'); raise SystemExit(3)")))
    wait_until(lambda: not target.list_instances())
    (gone,) = target.take_exited()
    assert (gone.id, gone.exit_code, gone.log) == ("r1", 3, "out of memory")
    assert target.take_exited() == []


def test_kills_an_instance_after_the_grace_period_also_from_another_target(target: LocalTarget, tmp_path: Path) -> None:
    target.start(launch(command=STUBBORN))
    wait_until(lambda: said(target))
    target.stop("r1", 0.3)
    (stopping,) = target.list_instances()
    assert stopping.stopping
    wait_until(lambda: not LocalTarget(tmp_path).list_instances())


def test_kills_the_child_processes_of_an_exited_instance(target: LocalTarget) -> None:
    running = target.start(launch(command=PARENT))
    wait_until(lambda: said(target).strip())
    child = int(said(target))
    os.kill(running.pid, signal.SIGKILL)
    wait_until(lambda: not target.list_instances())
    wait_until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)


def test_an_instance_does_not_inherit_settings_from_the_environment(
    target: LocalTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POWERBAND_PORT", "1")
    monkeypatch.setenv("POWERBAND_CACHE", "/c")
    code = "import os; print(sorted(n for n in os.environ if n.startswith('POWERBAND')))"
    target.start(launch(command=(sys.executable, "-c", code)))
    wait_until(lambda: "]" in said(target))
    assert "PORT" not in said(target)
    assert "POWERBAND_CACHE" in said(target)


def test_a_missing_program_is_an_error(target: LocalTarget) -> None:
    with pytest.raises(EnvironmentFault, match="Cannot start no-such-engine"):
        target.start(launch(command=("no-such-engine",)))
    assert list(target.list_instances()) == []
