"""A deployed service: `powerband deploy` of a plan for the demo model, and what its commands and files say of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from drills_for_tests import Front, wait_until

from powerband.fleet.service.status import ServiceStatus
from powerband.fleet.service.store import ServiceStore
from powerband.spec.deployment import Deployment, Replica, ReplicaPool
from powerband.spec.plan import Plan, Promise, write_plan
from powerband.spec.slo import SLO
from powerband.spec.workload.arrivals import OpenLoop
from powerband.spec.workload.lengths import Fixed
from powerband.spec.workload.workload import RequestMix, Workload

NAME = "drill"
# Token by token and at once give the same output only without rounding to 16 bits.
FLAGS = ("--no-verify", f"--name={NAME}", "--threads=1", "--engine-args=--dtype=float32")
SMALL = Replica(device="cpu", max_model_len=1024, max_num_seqs=16, max_num_batched_tokens=512)
_DEPLOY_S = 120.0


def plan_of(replica: Replica = SMALL, *, count: int = 3, rate: float = 4.0) -> Plan:
    requests = RequestMix(Fixed(12), Fixed(96))
    return Plan(
        model="demo",
        workload=Workload(name="drill", arrivals=OpenLoop.at(rate), requests=requests),
        slo=SLO.parse("ttft=60s@p95"),  # no refusals while a replica starts on the same, busy cores
        promise=Promise(rate),
        deployment=Deployment(engine="powerband", pools=(ReplicaPool(replica=replica, count=count),)),
    )


@dataclass
class Service:
    """One that is deployed, with its state in a folder of this test."""

    home: Path
    front: Front

    @property
    def folder(self) -> ServiceStore:
        return ServiceStore(self.home / NAME)

    @property
    def status(self) -> ServiceStatus:
        found = self.folder.read_status()
        assert found is not None
        return found

    def run(self, *arguments: str, timeout_s: float = _DEPLOY_S) -> str:
        """A command of ours, until it ends."""
        return command(self.home, *arguments, timeout_s=timeout_s)

    def deploy(self, plan: Plan) -> str:
        path = self.home / "plan.yaml"
        write_plan(plan, path)
        return self.run("deploy", str(path), *FLAGS)

    def pids(self) -> dict[str, int]:
        """Of replicas, by id."""
        return {one.id: one.pid for one in self.status.replicas}

    def wait_whole(self, count: int = 3, timeout_s: float = 60.0, without: str = "") -> float:
        """Until so many replicas take requests, in the gateway's eyes; seconds that it took."""

        def is_whole() -> bool:
            ready = asyncio.run(self.front.ready_replicas())
            return len(ready) == count and without not in ready

        return wait_until(is_whole, timeout_s)


@contextlib.contextmanager
def deployed(home: Path, count: int = 3) -> Iterator[Service]:
    home.mkdir(parents=True, exist_ok=True)
    service = Service(home, Front("", ""))
    try:
        service.deploy(plan_of(count=count))
        service.front = Front(service.status.gateway.url, service.folder.admin_key.read_text().strip())
        service.wait_whole(count)
        yield service
    finally:
        _end(service)


def _end(service: Service) -> None:
    """By its own command; and whatever that leaves is killed."""
    status = service.folder.read_status()
    with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
        service.run("remove", NAME, "--purge", timeout_s=60.0)
    pids = [] if status is None else [status.pid, status.gateway.pid, *(one.pid for one in status.replicas)]
    for pid in filter(None, pids):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            if b"powerband" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.killpg(pid, signal.SIGKILL)


def command(home: Path, *arguments: str, timeout_s: float = _DEPLOY_S) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "powerband", *arguments],
        env={**os.environ, "POWERBAND_STATE": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )
    assert done.returncode == 0, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def changed(max_num_seqs: int) -> Plan:
    """Another plan for the same model."""
    return plan_of(replace(SMALL, max_num_seqs=max_num_seqs))
