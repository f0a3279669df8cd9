"""A service of the demo model on this machine, from deploy to remove, by the commands that users type."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from powerband.cli.main import main
from powerband.fleet.service.store import ServiceStore, services
from powerband.fleet.targets.local import INSTANCE_TAG
from powerband.fleet.targets.processes import EnvironmentTag, session_leader_with
from powerband.spec.deployment import Deployment, Replica, ReplicaPool
from powerband.spec.plan import Plan, Promise, write_plan
from powerband.spec.slo import SLO
from powerband.spec.workload.options import ArrivalOptions, MixOptions, requested_load

READY_S = 120.0


def plan_file(path: Path, count: int = 1, **replica: Any) -> str:
    workload = requested_load(ArrivalOptions(rate=4.0), MixOptions(prompt_tokens="16-32", output_tokens="4-8")).workload
    made = Replica(device="cpu", **{"max_model_len": 1024, "max_num_seqs": 8, **replica})
    plan = Plan(
        model="demo",
        workload=workload,
        slo=SLO(ttft_s=20.0, tpot_s=5.0),
        promise=Promise(4.0, 1.0),
        deployment=Deployment(engine="powerband", pools=(ReplicaPool(replica=made, count=count),)),
    )
    write_plan(plan, path)
    return str(path)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state folder of its own; nothing that was started in it outlives the test."""
    monkeypatch.setenv("POWERBAND_STATE", str(tmp_path))
    yield tmp_path
    for folder in services():
        status = folder.read_status()
        pids = [status.pid, status.gateway.pid, *(one.pid for one in status.replicas)] if status is not None else []
        for pid in filter(None, pids):  # each leads a session of its own
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], seconds: float = READY_S) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, "it took too long"
        time.sleep(0.05)


def status_of(folder: ServiceStore) -> Any:
    found = folder.read_status()
    assert found is not None
    return found


def other_replica(folder: ServiceStore, before: str) -> Any:
    """The only replica, when it is ready and another than the one before."""
    found: list[Any] = []

    def is_there() -> bool:
        status = status_of(folder)
        found[:] = status.replicas
        return status.phase == "ready" and len(found) == 1 and found[0].id != before

    wait_until(is_there)
    return found[0]


def complete(url: str) -> int:
    body = json.dumps({"model": "demo", "prompt": "def f(", "max_tokens": 4}).encode()
    asked = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return int(answer.status)


def test_deploys_verifies_survives_crashes_rolls_scales_and_removes(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_file(tmp_path / "plan.yaml")
    assert main(["deploy", plan, "--port", "0", "--no-verify"]) == 2, "a service keeps its port, so it has to be known"
    assert main(["deploy", plan, "--name", "demo", "--verify-seconds", "5", "--strict"]) == 0
    told = capsys.readouterr()
    assert "promised" in told.out
    assert "SLO attainment" in told.out
    folder = ServiceStore.named("demo")
    url = status_of(folder).gateway.url
    assert complete(url) == 200

    assert main(["deploy", plan, "--name", "demo"]) == 0, "the same again changes nothing"
    assert "nothing to change" in capsys.readouterr().err
    (first,) = status_of(folder).replicas

    controller = status_of(folder).pid
    os.kill(controller, signal.SIGKILL)
    wait_until(lambda: not folder.controller_alive())
    assert complete(url) == 200, "the service goes on"
    assert main(["status"]) == 0
    assert "no controller is alive" in capsys.readouterr().out
    assert main(["deploy"]) == 0
    wait_until(lambda: status_of(folder).pid != controller and status_of(folder).phase == "ready")
    assert [one.id for one in status_of(folder).replicas] == [first.id], "taken over, not touched"

    os.kill(first.pid, signal.SIGKILL)
    second = other_replica(folder, first.id)
    assert second.restarts == 1
    assert complete(url) == 200

    assert main(["deploy", plan_file(tmp_path / "plan.yaml", max_num_seqs=4), "--no-verify"]) == 0
    (third,) = status_of(folder).replicas
    assert third.revision != second.revision

    assert main(["scale", "2"]) == 0
    assert len(status_of(folder).replicas) == 2
    assert main(["drain", third.id]) == 0
    assert {one.id: one.state for one in status_of(folder).replicas}[third.id] == "drained"
    assert complete(url) == 200
    assert main(["logs", third.id, "-n", "5"]) == 0
    assert "URL" in capsys.readouterr().out

    assert main(["remove"]) == 0
    assert services() == []
    assert folder.database.exists(), "keys and usage are kept"
    assert session_leader_with(EnvironmentTag(INSTANCE_TAG, str(folder.path / "members" / f"{third.id}.json"))) is None
    assert main(["remove"]) == 3
    assert "No service is deployed" in capsys.readouterr().err


def test_a_service_that_cannot_start_is_an_error_with_its_log_and_leaves_nothing(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_file(tmp_path / "plan.yaml")
    broken = ["deploy", plan, "--no-verify", "--engine-args", "--kv-cache-memory 1MiB"]
    assert main(broken) == 3
    told = capsys.readouterr().err
    assert "demo did not start" in told
    assert "kv_cache_memory" in told or "KV cache" in told, "the end of the replica's log"
    assert services() == []
    assert not (state / "demo").exists()
