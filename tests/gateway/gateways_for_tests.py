"""A gateway in a process of its own, before scripted replicas in processes of their own. All end by their own pids."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec

from powerband.fleet.control.gateway_client import _RecordsPage
from powerband.gateway.accounts.accounts import Accounts
from powerband.mock_server.behavior import Behavior

PATIENCE_S = 60.0  # for what comes at once where nothing else runs


@dataclass
class ScriptedReplica:
    url: str
    process: subprocess.Popen[str]

    def truths(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx.get(f"{self.url}/records").json()
        return found

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class RunningGateway:
    """http: asks as anyone. admin: with the key of an administrator. database: of its keys and usage."""

    url: str
    process: subprocess.Popen[str]
    http: httpx.Client
    admin: httpx.Client
    database: Path
    replicas: list[ScriptedReplica] = field(default_factory=list)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a streamed answer, decoded; '[DONE]' as it is. Raises httpx.TransportError when it breaks."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as answer:
            if answer.status_code != 200:
                answer.read()
                raise AssertionError(f"{answer.status_code} {answer.text}")
            return events_of(answer.iter_lines())

    def records(self, after: int = 0) -> list[dict[str, Any]]:
        response = self.admin.get("/admin/records", params={"after": after})
        msgspec.json.decode(response.content, type=_RecordsPage)  # as a controller reads them
        found: list[dict[str, Any]] = response.json()["records"]
        return found

    def replica_states(self) -> dict[str, str]:
        pools = self.admin.get("/admin/routes").json()["pools"]
        return {replica["id"]: replica["state"] for pool in pools for replica in pool["replicas"]}


def events_of(lines: Iterator[str]) -> list[Any]:
    data = [line.removeprefix("data: ") for line in lines if line]
    return [one if one == "[DONE]" else msgspec.json.decode(one) for one in data]


def text_of(events: Sequence[Any]) -> str:
    """What a client makes of the events of a stream, of either kind."""
    choices = [choice for one in events if one != "[DONE]" for choice in one.get("choices", ())]
    return "".join(one.get("text") or one.get("delta", {}).get("content") or "" for one in choices)


def until(condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> float:
    """Seconds until `condition()` holds."""
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() - start_s < timeout_s, "the condition never held"
        time.sleep(0.01)
    return time.monotonic() - start_s


@contextlib.contextmanager
def asking(gateway: RunningGateway, path: str, body: dict[str, Any], key: str = "") -> Iterator[None]:
    """A request whose client leaves when the block ends, whatever was answered by then."""
    data = msgspec.json.encode(body)
    authority = gateway.url.removeprefix("http://")
    lines = [f"POST {path} HTTP/1.1", f"Host: {authority}", f"Content-Length: {len(data)}"]
    lines += [f"Authorization: Bearer {key}"] if key else []
    host, _, port = authority.partition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall("\r\n".join([*lines, "Content-Type: application/json", "", ""]).encode() + data)
        yield


@contextlib.contextmanager
def scripted_replica(script: Behavior | None = None) -> Iterator[ScriptedReplica]:
    code = msgspec.json.encode(asdict(script or Behavior())).decode()
    command = [sys.executable, "-m", "powerband.mock_server.server", "--with-parent", "--script", code]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        yield ScriptedReplica(process.stdout.readline().strip(), process)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


@contextlib.contextmanager
def running_gateway(folder: Path, *arguments: str, timeout_s: float = PATIENCE_S) -> Iterator[RunningGateway]:
    """`powerband gateway` with these arguments; its database is in `folder`, with one administrator's key.

    Returns when it listens; whether replicas are ready is another matter, see `until`.
    """
    database = folder / "gateway.db"
    accounts = Accounts.open(database)
    _, secret = accounts.keys.create("admin", scopes=("admin", "infer", "metrics"))
    accounts.close()
    command = [sys.executable, "-m", "powerband", "gateway", "--port=0", f"--database={database}", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("POWERBAND_")}
    log = (folder / "gateway.log").open("ab")
    process = subprocess.Popen(command, stderr=log, text=True, start_new_session=True, env=environment)
    begun = (folder / "gateway.log").stat().st_size

    def url() -> str:
        lines = (folder / "gateway.log").read_bytes()[begun:].decode().splitlines()
        assert process.poll() is None, "\n".join(lines)
        return next((line.split()[-1] for line in lines if line.startswith("URL")), "")

    try:
        until(url, timeout_s)
        base = url()
        with (
            httpx.Client(base_url=base, timeout=30) as http,
            httpx.Client(base_url=base, timeout=30, headers={"Authorization": f"Bearer {secret}"}) as admin,
        ):
            yield RunningGateway(base, process, http, admin, database)
    finally:
        log.close()
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def gateway_before(
    folder: Path, *scripts: Behavior, arguments: Sequence[str] = (), routes: str = "", ready: bool = True
) -> Iterator[RunningGateway]:
    """A gateway before one scripted replica for each script, all ready. routes: as in a file, with {0} for the first
    one's URL, and so on."""
    with contextlib.ExitStack() as stack:
        replicas = [stack.enter_context(scripted_replica(script)) for script in scripts]
        flags = [f"--replica={replica.url}" for replica in replicas]
        if routes:
            (folder / "routes.yaml").write_text(routes.format(*(replica.url for replica in replicas)))
            flags = [f"--routes={folder / 'routes.yaml'}"]
        gateway = stack.enter_context(running_gateway(folder, *flags, *arguments))
        gateway.replicas = replicas
        if ready:
            until(lambda: set(gateway.replica_states().values()) == {"ready"})
        yield gateway
