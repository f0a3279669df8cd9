"""What drills share: replicas and a gateway in processes of their own, a load whose every answer is checked, figures.

A drill does to a service what happens to services, while people use it, and says what they noticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drill_loads import SERVED, put

from powerband.bench.client.http import delete, get, post
from powerband.bench.client.messages import ServerAddress
from powerband.gateway.accounts.accounts import Accounts
from powerband.gateway.routes import ModelRoute, ReplicaAddress, Routes
from powerband.http_client.request import Response
from powerband.mock_server.behavior import Behavior

PYTHON = (sys.executable, "-m")
# Token by token and at once give the same output only without rounding to 16 bits.
DEMO = ("serve", "demo", "--dtype=float32", "--threads=1", "--max-num-seqs=16", "--max-num-batched-tokens=512")
_START_S = 180.0
_END_S = 30.0


# ---- processes


@dataclass
class Member:
    """A replica or a gateway that this test has started."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def signal(self, number: signal.Signals) -> None:
        """To the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """In order; insists in the end."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        self.signal(signal.SIGCONT)
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self.signal(signal.SIGKILL)  # what it left behind


def start(command: Sequence[str], url: str, log: Path, env: Mapping[str, str] | None = None) -> Member:
    """A process in a session of its own, from `python -m`'s arguments."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*PYTHON, *command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            env={**os.environ, **(env or {})},
        )
    return Member(process, url, log)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_demo(folder: Path, *flags: str, port: int | None = None) -> Member:
    """`powerband serve demo`, one thread, exact arithmetic. Not ready yet: see `wait_ready`."""
    port = port or free_port()
    command = ("powerband", *DEMO, f"--port={port}", "--log-level=warning", *flags)
    return start(command, f"http://127.0.0.1:{port}", folder / f"demo-{port}.log")


def start_scripted(folder: Path, script: Behavior, port: int | None = None) -> Member:
    port = port or free_port()
    told = json.dumps(dataclasses.asdict(dataclasses.replace(script, model=SERVED)))
    command = ("powerband.mock_server.server", f"--port={port}", f"--script={told}")
    return start(command, f"http://127.0.0.1:{port}", folder / f"scripted-{port}.log")


@dataclass
class Front:
    """A gateway by its address, with an admin key."""

    url: str
    key: str

    def target(self, **more: Any) -> ServerAddress:
        return ServerAddress(base=self.url, endpoint="completions", model=SERVED, **more)

    @property
    def admin(self) -> ServerAddress:
        return self.target(headers={"Authorization": f"Bearer {self.key}"})

    async def ask(self, path: str) -> Any:
        """GET as administrator."""
        page = await get(self.admin, path, timeout_s=10.0)
        assert page.status == 200, (path, page.status, page.body[:300])
        return page.json()

    async def post(self, path: str, body: object) -> Response:
        return await post(self.admin, path, body, timeout_s=10.0)

    async def delete(self, path: str) -> Response:
        return await delete(self.admin, path)

    async def metrics(self) -> str:
        return (await get(self.admin, "/metrics")).body.decode()

    async def pool(self) -> dict[str, Any]:
        """The snapshot of the only pool."""
        found: dict[str, Any] = (await self.ask("/admin/routes"))["pools"][0]
        return found

    async def ready_replicas(self) -> list[str]:
        """Ids."""
        return [one["id"] for one in (await self.pool())["replicas"] if one["state"] == "ready"]

    async def records(self, after: int = 0) -> list[dict[str, Any]]:
        """Of requests that ended, see powerband.gateway.request.Finished."""
        found: list[dict[str, Any]] = []
        while page := (await self.ask(f"/admin/records?after={after}"))["records"]:
            found += page
            after = page[-1]["sequence"]
        return found


@dataclass
class Gateway(Front):
    """A gateway's process that this test has started."""

    member: Member
    folder: Path
    flags: tuple[str, ...]
    revision: int = 0

    @property
    def pid(self) -> int:
        return self.member.pid

    async def serve(self, replicas: Sequence[ReplicaAddress]) -> None:
        """Say anew which replicas there are."""
        self.revision += 1
        await put(self.admin, "/admin/routes", routes_of(replicas, f"drill-{self.revision}").as_dict())

    def restart(self) -> None:
        """With the same port and books, as after a crash."""
        self.member.kill()
        self.member = _start_gateway(self.folder, self.member.port, self.flags)
        wait_ready(self.member, path="/livez")


def routes_of(replicas: Sequence[ReplicaAddress], revision: str) -> Routes:
    return Routes(models=(ModelRoute(name=SERVED, replicas=tuple(replicas)),), revision=revision)


def address(member: Member, **more: Any) -> ReplicaAddress:
    told: dict[str, Any] = {"max_num_seqs": 16, **more}
    return ReplicaAddress(id=f"r{member.port}-{member.pid}", url=member.url, model=SERVED, **told)


@contextlib.contextmanager
def gateway(folder: Path, replicas: Sequence[ReplicaAddress] = (), *flags: str) -> Iterator[Gateway]:
    """In front of replicas that are there already, and ready to answer."""
    folder.mkdir(parents=True, exist_ok=True)
    accounts = Accounts.open(folder / "gateway.db")
    key = accounts.keys.create("drill", ("infer", "metrics", "admin"))[1]
    accounts.close()
    member = _start_gateway(folder, free_port(), flags)
    found = Gateway(member.url, key, member, folder, flags)
    try:
        wait_ready(found.member, path="/livez")
        if replicas:
            asyncio.run(found.serve(replicas))
            wait_until(lambda: len(asyncio.run(found.ready_replicas())) == len(replicas), 60.0)
        yield found
    finally:
        found.member.end()


def _start_gateway(folder: Path, port: int, flags: Sequence[str]) -> Member:
    command = ("powerband", "gateway", f"--port={port}", f"--database={folder / 'gateway.db'}", "--log-level=warning")
    return start((*command, *flags), f"http://127.0.0.1:{port}", folder / "gateway.log")


@contextlib.contextmanager
def members(found: Sequence[Member]) -> Iterator[list[Member]]:
    """Wait until all are ready; end them and whatever was put into the list, in the end."""
    kept = list(found)
    try:
        for member in kept:
            wait_ready(member)
        yield kept
    finally:
        for member in kept:
            member.end()


def wait_ready(member: Member, timeout_s: float = _START_S, path: str = "/readyz") -> None:
    target = ServerAddress(base=member.url, endpoint="completions", model=SERVED)

    def is_ready() -> bool:
        assert member.process.poll() is None, member.log.read_text()[-2000:]
        with contextlib.suppress(OSError, TimeoutError):
            return asyncio.run(get(target, path, timeout_s=2.0)).status == 200
        return False

    wait_until(is_ready, timeout_s)


def wait_until(is_so: Callable[[], bool], timeout_s: float, pause_s: float = 0.05) -> float:
    """Seconds that it took. Raises AssertionError when it did not become so in time."""
    start_s = time.monotonic()
    while not is_so():
        assert time.monotonic() - start_s < timeout_s, f"not within {timeout_s:.0f} s"
        time.sleep(pause_s)
    return time.monotonic() - start_s


# ---- baselines


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    memory_bytes: int
    descriptors: int

    @classmethod
    def by(cls, pid: int) -> Held:
        status = Path(f"/proc/{pid}/status").read_text()
        resident = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return cls(int(resident.split()[1]) << 10, len(os.listdir(f"/proc/{pid}/fd")))


def cpu_s(pid: int) -> float:
    """Of all of its threads, since its start."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def engines_of(replica: int) -> list[int]:
    """Process ids of a replica's engine; its own is `replica`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == replica and b"powerband.engine.process" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


async def gauge(url: str, name: str) -> float:
    """Of a replica's metrics, summed over labels."""
    page = await get(ServerAddress(base=url, endpoint="completions", model=SERVED), "/metrics")
    lines = [line for line in page.body.decode().splitlines() if line.startswith((f"{name}{{", f"{name} "))]
    assert lines, f"no {name}"
    return sum(float(line.split()[-1]) for line in lines)


# ---- figures


class Figures:
    """What a drill measured, for the table of `make drills`: one line of JSON a drill in $DRILLS_FILE."""

    def __init__(self, drill: str) -> None:
        self.drill = drill
        self.values: dict[str, str] = {}

    def note(self, **values: object) -> None:
        self.values |= {
            name: f"{value:.3g}" if isinstance(value, float) else str(value) for name, value in values.items()
        }

    def write(self, passed: bool, seconds: float) -> None:
        path = os.environ.get("DRILLS_FILE")
        if path:
            line = {"drill": self.drill, "passed": passed, "seconds": round(seconds, 1), "figures": self.values}
            with Path(path).open("a") as file:
                file.write(json.dumps(line) + "\n")


@functools.cache
def minutes() -> float:
    """Of the soak: DRILLS_SOAK=30m; as short as it may be otherwise."""
    text = os.environ.get("DRILLS_SOAK", "")
    if not text:
        return 0.2
    number, unit = text.rstrip("smh"), text[-1]
    return float(number) * {"s": 1 / 60, "m": 1.0, "h": 60.0}.get(unit, 1.0)
