"""Files that the version before wrote, and processes that it started: this version continues with them.

previous_version/ holds the folder of a service that was deployed with that version, its plan, and the status that it
wrote after a failed rollout.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fleet_for_tests import Life, Play, World

from powerband.cli.main import main
from powerband.cli.service.deploy import ServiceFlags, _policy
from powerband.cli.service.gateway_flags import gateway_arguments
from powerband.fleet.control.controller_process import CONTROLLER_TAG
from powerband.fleet.control.gateway_client import GatewayClient
from powerband.fleet.control.instance_specs import gateway_revision, pool_revisions, release_revision
from powerband.fleet.monitor.incidents import Incidents, read_incidents
from powerband.fleet.release import ReleaseOptions, build_release
from powerband.fleet.service.spec import GatewaySpec, Policy, ServiceSpec
from powerband.fleet.service.store import ServiceStore
from powerband.fleet.targets.base import Instance
from powerband.fleet.targets.local import INSTANCE_TAG, LocalTarget
from powerband.fleet.targets.processes import identify
from powerband.gateway.routes import ModelRoute, ReplicaAddress
from powerband.renamed import warn_renamed
from powerband.spec.plan import read_plan

WRITTEN = Path(__file__).parent / "previous_version"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServiceStore:
    monkeypatch.setenv("POWERBAND_STATE", str(tmp_path))
    shutil.copytree(WRITTEN, tmp_path / "demo")
    return ServiceStore(tmp_path / "demo")


def spec_of(store: ServiceStore) -> ServiceSpec:
    found = store.read_spec()
    assert found is not None
    return found


def test_reads_the_desired_state(store: ServiceStore) -> None:
    spec = spec_of(store)
    assert (spec.gateway.port, spec.gateway.auth, spec.gateway.arguments) == (
        18000,
        "keys",
        ("--default-deadline-s", "20"),
    )
    assert spec.policy == Policy(max_surge=1, auto_remediate=True, webhook="https://example.org/hook")
    assert spec.policy.drain_timeout_s == 120.0
    assert spec.drained == ("r4",)
    assert spec.release.counts == (2,)
    assert "--max-num-seqs=8" in spec.release.pools[0].command
    assert spec.previous is not None
    assert "--max-num-seqs=4" in spec.previous.pools[0].command


def test_reads_a_failed_rollout(store: ServiceStore) -> None:
    shutil.copy(WRITTEN / "status_after_a_failed_rollout.json", store.path / "status.json")
    status = store.read_status()
    assert status is not None
    failed = status.failed_rollout
    assert failed is not None
    assert (failed.generation, failed.replica, failed.exit_code) == (2, "r9", 2)
    assert (failed.reason, failed.log) == ("r9 ended before it was ready (exit code 2)", "error: no such model")
    assert status.monitor["promised_rate"] == 4.0
    assert (status.load.good, status.load.next_record, status.last_ready_generation) == (3, 3, 1)


def test_writes_the_same_fields_so_that_both_versions_can_run_together(store: ServiceStore) -> None:
    """A controller of the version before reads what a command of this one writes, until it is replaced."""
    for name, value in (("desired.json", store.read_spec()), ("status.json", store.read_status())):
        written = json.loads(msgspec.json.encode(value))
        if name == "status.json":
            assert written["load"].pop("plan") == ""  # new, and ignored by the version before
        assert written == json.loads((WRITTEN / name).read_text())
    assert (INSTANCE_TAG, CONTROLLER_TAG) == ("POWERBAND_MEMBER", "POWERBAND_CONTROLLER")


def test_running_instances_keep_their_revision(store: ServiceStore) -> None:
    spec, status = spec_of(store), store.read_status()
    assert status is not None
    assert pool_revisions(spec.release) == (status.replicas[0].revision,)
    assert release_revision(spec.release) == status.revision
    record = json.loads((WRITTEN / "members" / "gateway-3.json").read_text())
    assert gateway_revision(spec.gateway) == record["revision"]


def test_the_controller_recovers_replicas_and_gateway_without_a_restart(store: ServiceStore) -> None:
    world = World(store)
    for path in (WRITTEN / "members").glob("*.json"):
        record = json.loads(path.read_text())
        fields = {name: record[name] for name in ("id", "role", "revision", "pool", "url", "started_at", "ready_path")}
        world.lives[record["id"]] = Life(Instance(**fields, pid=record["process"]["pid"]), ready=True)
        world.commands[record["id"]] = ""
    play = Play(world)
    play.tick()
    play.tick()
    status = play.status()
    assert (status.phase, status.last_ready_generation, world.started) == ("ready", 2, 0)
    assert sorted(world.lives) == ["gateway-3", "r4", "r5"]
    assert {one.id: one.state for one in status.replicas} == {"r4": "drained", "r5": "ready"}
    assert (status.load.scheduled, status.load.good) == (3, 3)
    assert store.next_number() == 6


OLD_OPTIONS = ("--longest-wait-s", "5", "--max-tries=2", "--access-log")
NEW_OPTIONS = ("--max-queue-wait-s", "5", "--max-attempts=2", "--access-log")


@pytest.mark.parametrize("arguments", [OLD_OPTIONS, NEW_OPTIONS])
def test_a_new_name_of_an_option_restarts_no_gateway(arguments: tuple[str, ...]) -> None:
    """The revision is what the version before computed for OLD_OPTIONS."""
    assert gateway_revision(GatewaySpec(host="127.0.0.1", port=18000, auth="keys", arguments=arguments)) == "c93fbdd4"


def test_deploy_takes_old_names_in_gateway_args_and_stores_the_new_ones(caplog: pytest.LogCaptureFixture) -> None:
    warn_renamed.cache_clear()
    assert gateway_arguments(" ".join(OLD_OPTIONS)) == NEW_OPTIONS
    assert "--longest-wait-s is now called --max-queue-wait-s" in caplog.text
    caplog.clear()
    assert gateway_arguments(" ".join(NEW_OPTIONS)) == NEW_OPTIONS
    assert not caplog.text


class OldGateway(ThreadingHTTPServer):
    """Takes a replica's `longest_prompt`, as the version before did, and no field that it does not know."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), OldGatewayHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.routes: dict[str, Any] = {"revision": "1", "models": []}


class OldGatewayHandler(BaseHTTPRequestHandler):
    server: OldGateway

    def do_GET(self) -> None:
        self.respond(200, {"routes": self.server.routes} if "routes" in self.path else {"next": 0})

    def do_PUT(self) -> None:
        routes = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/admin/routes":
            return self.respond(404, {})
        replicas = [replica for model in routes["models"] for replica in model["replicas"]]
        if any("max_prompt_tokens" in replica for replica in replicas):
            return self.respond(400, {"error": {"message": "routes: models: 'max_prompt_tokens' is unknown."}})
        self.server.routes = routes
        return self.respond(200, {})

    def respond(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def old_gateway() -> Iterator[OldGateway]:
    server = OldGateway()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_controller_sends_routes_to_a_gateway_of_the_version_before(old_gateway: OldGateway) -> None:
    replica = ReplicaAddress(id="r1", url="http://127.0.0.1:1", model="m", max_prompt_tokens=7, draining=True)
    client = GatewayClient("key", old_gateway.url, "m", ModelRoute(name="m", replicas=(replica,), revision="2"))
    asyncio.run(client._poll())
    assert old_gateway.routes["models"][0]["replicas"][0]["longest_prompt"] == 7
    assert client.snapshot is not None
    assert (client.snapshot.route_revision, client.snapshot.draining) == ("2", frozenset({"r1"}))


@pytest.fixture
def old_process(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    tag = str(tmp_path / "demo" / "members" / "r5.json")
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"],
        env={**os.environ, "POWERBAND_MEMBER": tag},
        start_new_session=True,
    )
    yield process
    process.kill()
    process.wait()


def test_the_target_finds_processes_of_the_version_before(
    store: ServiceStore, old_process: subprocess.Popen[bytes]
) -> None:
    path = store.path / "members" / "r5.json"
    record = json.loads(path.read_text())
    identity = identify(old_process.pid)
    assert identity is not None
    # As the version before read it: field 22 of /proc/PID/stat.
    started = int(Path(f"/proc/{old_process.pid}/stat").read_text().rpartition(")")[2].split()[19])
    record["process"] = {"pid": old_process.pid, "started": started, "boot": identity.boot}
    path.write_text(json.dumps(record))
    target = LocalTarget(store.path)
    (found,) = target.list_instances()  # the processes of the other records are gone
    assert (found.id, found.pid, found.url) == ("r5", old_process.pid, record["url"])
    target.stop("r5", 0.0)
    assert old_process.wait(10) != 0


def test_reads_incidents(store: ServiceStore) -> None:
    closed, still_open = read_incidents(store.incidents)
    assert (closed.cause, closed.done, closed.is_open) == ("load", ("one more replica: 2",), False)
    assert (still_open.cause, still_open.subject, still_open.is_open) == ("hang", "r4", True)
    assert Incidents(store.incidents).open == (still_open,)


def test_commands_show_the_service(store: ServiceStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "demo"]) == 3, "its processes are gone"
    assert "down: none of its processes runs" in capsys.readouterr().out
    assert main(["status", "demo", "--json"]) == 3
    shown = json.loads(capsys.readouterr().out)
    assert shown["desired"] == json.loads((WRITTEN / "desired.json").read_text())
    assert main(["incidents", "demo"]) == 0
    assert "Replica r4" in capsys.readouterr().out


def test_its_plan_builds_the_same_replicas(store: ServiceStore) -> None:
    built = build_release(read_plan(WRITTEN / "plan.yaml"), ReleaseOptions(served_name="demo", threads=1)).release
    (pool,), (before,) = built.pools, spec_of(store).release.pools
    assert pool.command[1:] == before.command[1:], "but for the Python that runs it"
    assert msgspec.structs.replace(pool, command=before.command) == before


def test_the_old_names_of_options_still_work_with_a_warning(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_renamed.cache_clear()
    assert _policy(replace(ServiceFlags(), surge=0, auto=True)) == Policy(max_surge=0, auto_remediate=True)
    assert "--surge is now called --max-surge" in caplog.text
    assert "--auto is now called --auto-remediate" in caplog.text
    assert _policy(replace(ServiceFlags(), max_surge=0, auto_remediate=True)) == Policy(
        max_surge=0, auto_remediate=True
    )
    assert main(["deploy", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--max-surge" in shown
    assert "--surge" not in shown.replace("--max-surge", "")
    assert "--auto " not in shown
