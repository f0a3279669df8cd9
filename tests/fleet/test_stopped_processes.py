"""Stopped (SIGSTOP) or hung processes hold locks and do not respond: every wait for them has a timeout."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from powerband.errors import EnvironmentFault
from powerband.fleet import operations
from powerband.fleet.control import controller_process
from powerband.fleet.control.controller_process import ensure_controller
from powerband.fleet.service import store
from powerband.fleet.service.spec import GatewaySpec, PoolRelease, Release, ServiceSpec
from powerband.fleet.service.status import ServiceStatus
from powerband.fleet.service.store import ServiceStore, lock
from powerband.fleet.targets.processes import EnvironmentTag, identify, is_alive, session_leader_with

PLAN = {"version": 1, "model": "m", "workload": {}, "slo": {"ttft_s": 1.0}, "promise": {"rate": 1.0}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServiceStore:
    """Of a service that wants no replica, and whose gateway cannot start."""
    monkeypatch.setenv("POWERBAND_STATE", str(tmp_path))
    monkeypatch.setattr(store, "HEARTBEAT_TIMEOUT_S", 1.0)
    monkeypatch.setattr(controller_process, "_HANG_CHECK_S", 60.0)  # a heartbeat may take its time
    made = ServiceStore.named("demo")
    made.create()
    pool = PoolRelease(count=0, engine="powerband", command=("true",))
    gateway = GatewaySpec(host="127.0.0.1", port=1, arguments=("--no-such-setting",))
    release = Release(plan=PLAN, served_name="m", pools=(pool,))
    made.write_spec(ServiceSpec(name="demo", generation=1, release=release, gateway=gateway))
    return made


def controller_of(folder: ServiceStore) -> int:
    found = session_leader_with(EnvironmentTag(controller_process.CONTROLLER_TAG, str(folder.controller_lock)))
    assert found is not None
    return found.pid


def wait_until_hung(folder: ServiceStore) -> None:
    deadline_s = time.monotonic() + 60
    while folder.controller_state() != "hung":
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_replaces_a_controller_that_was_stopped(folder: ServiceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ensure_controller(folder)
    stopped = identify(controller_of(folder))
    assert stopped is not None
    try:
        assert not ensure_controller(folder), "it is well"
        os.kill(stopped.pid, signal.SIGSTOP)
        wait_until_hung(folder)
        monkeypatch.setattr(controller_process, "_HANG_CHECK_S", 0.5)
        assert not folder.controller_alive()
        assert ensure_controller(folder)
        assert not is_alive(stopped)
        assert controller_of(folder) != stopped.pid
    finally:
        os.kill(controller_of(folder), signal.SIGKILL)


def test_keeps_a_controller_that_was_only_suspended(folder: ServiceStore) -> None:
    """As all processes do when the machine is suspended: its heartbeats go on before anybody has looked for long."""
    assert ensure_controller(folder)
    pid = controller_of(folder)
    try:
        os.kill(pid, signal.SIGSTOP)
        wait_until_hung(folder)
        os.kill(pid, signal.SIGCONT)
        assert not ensure_controller(folder)
        assert controller_of(folder) == pid
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_hung_controller_without_a_process_is_an_error_with_a_hint(
    folder: ServiceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller_process, "_HANG_CHECK_S", 0.5)
    with lock(folder.controller_lock):
        os.utime(folder.controller_lock, (0, 0))
        with pytest.raises(EnvironmentFault, match="is hung and could not be killed") as caught:
            ensure_controller(folder)
    assert "kill -9" in caught.value.hint


def test_a_command_stopped_during_a_change_blocks_others_only_for_a_while(folder: ServiceStore) -> None:
    with (
        lock(folder.path / "desired.lock"),
        pytest.raises(EnvironmentFault, match="Another command has been changing demo"),
        folder.lock_spec(wait_s=0.1),
    ):
        pass


def test_waiting_for_a_status_ends_at_the_timeout(folder: ServiceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServiceStore, "controller_alive", lambda _folder: True)
    told: list[ServiceStatus] = []
    with pytest.raises(EnvironmentFault, match="was not ready within 0 s"):
        operations.wait_for(folder, 1, told.append, 0.3)
    assert not told
