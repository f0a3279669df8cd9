"""Where a service's state lies, and what stands in it: one folder a service, one writer a file.

desired.json     what should be          written by commands, under desired.lock
status.json      what is                 written by the controller
controller.lock  held by the controller that is alive
members/         what the local target started (fleet.local)
admin.key        the gateway's first admin key, for this user only
gateway.db       keys, usage, audit: the gateway's
logs/            of the gateway, the controller and every replica
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from powerband.errors import EnvironmentFault, UsageError
from powerband.files import make_private_folder, write_atomically
from powerband.folders import state_home
from powerband.spec.deployment import EngineName

logger = logging.getLogger(__name__)

Kind = TypeVar("Kind")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
CONTROLLER_SILENT_S = 8.0  # without a heartbeat, until a controller counts as hung; it beats several times a second
_LOCK_POLL_S = 0.02
_CHANGE_S = 20.0  # for another command to finish its change
_DAMAGED = "Remove the service with 'powerband remove', or delete the file."

Phase = Literal["starting", "ready", "degraded", "rolling", "failed", "removing", "removed"]
ReplicaState = Literal["starting", "ready", "unready", "draining", "drained", "stopping"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRelease:
    """Equal replicas, and how one is started: by the adapter of its engine, when the release was made.

    command: with the word {port}. threads: that one computes with on a CPU; None: the engine's choice. gpus: that one
    takes. max_num_seqs, longest_prompt: as the plan has them.
    """

    count: int
    engine: EngineName
    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    ready_path: str = "/readyz"
    max_num_seqs: int = 256
    longest_prompt: int | None = None
    threads: int | None = None
    gpus: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What a service runs. plan: Plan.as_dict(). gpus: indices of those that the replicas may use; none on a CPU.
    api_key_file: of the key that they want; '': none.
    """

    plan: dict[str, Any]
    served_name: str
    pools: tuple[PoolRelease, ...]
    gpus: tuple[int, ...] = ()
    api_key_file: str = ""

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(pool.count for pool in self.pools)


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """How the gateway listens. arguments: more of its settings, as its command takes them."""

    host: str
    port: int
    auth: Literal["open", "keys"] = "open"
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """surge: replicas beyond the asked number while one is replaced; 0: the old one ends first; None: 1 where memory
    and devices allow. Seconds: drain_s, for running requests to end; ready_s, for a replica to become ready; hung_s,
    without an answer until a replica counts as hung; unready_s, that it may say that it is not ready.
    auto: carry out what the watcher suggests. webhook: a URL that is told of incidents.
    """

    surge: int | None = None
    drain_s: float = 120.0
    ready_s: float = 1800.0
    hung_s: float = 6.0
    unready_s: float = 30.0
    auto: bool = False
    webhook: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """What a service should be. generation: counts the changes. previous: what ran before this release, to go back to.

    drained: replicas that get nothing new until they are brought back.
    """

    name: str
    generation: int
    release: Release
    front: Front
    policy: Policy = field(default_factory=Policy)
    previous: Release | None = None
    drained: tuple[str, ...] = ()
    removed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """running, waiting: requests. kv_usage: share of its KV cache. restarts: how often its place was filled anew."""

    id: str
    pool: int
    revision: str
    state: ReplicaState
    pid: int
    url: str
    started_at: float
    ready_at: float | None = None
    running: int = 0
    waiting: int = 0
    kv_usage: float | None = None
    restarts: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayStatus:
    state: Literal["starting", "ready", "down"]
    url: str
    pid: int = 0
    started_at: float = 0.0
    ready_at: float | None = None
    restarts: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """requests_per_s: of the last minute. attainment: of all requests since `since`; None: there were none."""

    requests_per_s: float = 0.0
    running: int = 0
    queued: int = 0
    scheduled: int = 0
    good: int = 0
    since: float = 0.0
    next_record: int = 0  # of the gateway's, that was not counted yet

    @property
    def attainment(self) -> float | None:
        return self.good / self.scheduled if self.scheduled else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A generation that did not become ready. log: the end of what its replica said."""

    generation: int
    why: str
    replica: str = ""
    log: str = ""
    exit_code: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What is, as the controller saw it at `at` (time.time()). established: the last generation that was all ready.
    incidents: the open ones, each in a sentence. watcher: Watcher.report().
    """

    at: float
    pid: int
    generation: int
    phase: Phase
    revision: str
    gateway: GatewayStatus
    replicas: tuple[ReplicaStatus, ...] = ()
    established: int = 0
    rejected: Rejected | None = None
    load: Load = field(default_factory=Load)
    notes: tuple[str, ...] = ()
    incidents: tuple[str, ...] = ()
    watcher: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ServiceFolder:
    """The files of one service."""

    path: Path

    @classmethod
    def of(cls, name: str) -> ServiceFolder:
        """Raises UsageError for what is no name."""
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{name!r} is no name of a service.",
                hint="Small letters, digits, '.', '_' and '-', at most 63 of them.",
                param="name",
            )
        return cls(state_home() / name)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def database(self) -> Path:
        return self.path / "gateway.db"

    @property
    def admin_key(self) -> Path:
        return self.path / "admin.key"

    @property
    def incidents(self) -> Path:
        return self.path / "incidents.json"

    def make(self) -> None:
        """Raises EnvironmentFault."""
        try:
            make_private_folder(self.logs)
            self.path.chmod(0o700)
        except OSError as problem:
            raise EnvironmentFault(
                f"Cannot keep state in {self.path}: {problem.strerror}.",
                hint="POWERBAND_STATE names another folder.",
                param="name",
            ) from None

    def exists(self) -> bool:
        return (self.path / "desired.json").exists()

    def desired(self) -> Desired | None:
        """None: there is no such service. Raises EnvironmentFault when the file is damaged."""
        return _read(self.path / "desired.json", Desired)

    def status(self) -> Status | None:
        """None: no controller has written yet."""
        return _read(self.path / "status.json", Status)

    def write_status(self, status: Status) -> None:
        write_json(self.path / "status.json", status, durable=False)

    def write_desired(self, desired: Desired) -> None:
        """Only inside `changing`. Raises EnvironmentFault."""
        path = self.path / "desired.json"
        try:
            write_json(path, desired)
        except OSError as problem:
            raise EnvironmentFault(f"Cannot write {path}: {problem.strerror}.", param="name") from None

    @contextlib.contextmanager
    def changing(self, wait_s: float = _CHANGE_S) -> Iterator[None]:
        """One command at a time. Raises EnvironmentFault when another one does not finish within `wait_s`."""
        self.make()
        path = self.path / "desired.lock"
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(lock(path, wait_s=wait_s))
            except BlockingIOError:
                raise EnvironmentFault(
                    f"Another command has been changing {self.name} for more than {wait_s:g} s.",
                    hint=f"It may be stopped: 'fuser {path}' shows its process.",
                    param="name",
                ) from None
            yield

    @property
    def controller_lock(self) -> Path:
        return self.path / "controller.lock"

    def controller_state(self) -> Literal["alive", "hung", "none"]:
        """hung: a process holds the controller's lock, but has sent no heartbeat for CONTROLLER_SILENT_S."""
        if not self.controller_lock.exists():
            return "none"
        try:
            with lock(self.controller_lock):
                return "none"
        except BlockingIOError:
            is_silent = abs(time.time() - self.controller_beat()) > CONTROLLER_SILENT_S
            return "hung" if is_silent else "alive"

    def controller_alive(self) -> bool:
        return self.controller_state() == "alive"

    def controller_beat(self) -> float:
        """When the controller's last heartbeat was, on time.time()."""
        return self.controller_lock.stat().st_mtime

    def next_number(self) -> int:
        """For the id of the next replica: never the same twice, whatever ends in between. Only the controller asks.

        On a full disk the clock counts: in microseconds it is beyond what any count comes to.
        """
        path = self.path / "sequence"
        try:
            number = int(path.read_text()) + 1 if path.exists() else 1
            write_atomically(path, str(number).encode(), private=True)
        except (OSError, ValueError) as problem:
            logger.warning("%s cannot be written, so the clock numbers what is started: %s.", path, problem)
            return time.time_ns() // 1000
        return number

    def forget(self, *, purge: bool) -> None:
        """Delete the state of a service that was removed; the gateway's books only with `purge`."""
        if purge:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        for name in ("members", "logs"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in ("desired.json", "status.json", "routes.json"):
            (self.path / name).unlink(missing_ok=True)


def services() -> list[ServiceFolder]:
    """All that are there, by name."""
    home = state_home()
    found = [ServiceFolder(path) for path in home.iterdir() if path.is_dir()] if home.is_dir() else []
    return sorted((folder for folder in found if folder.exists()), key=lambda folder: folder.name)


def find_service(name: str | None) -> ServiceFolder:
    """The one with this name; without a name the only one. Raises UsageError with what there is."""
    known = services()
    names = ", ".join(folder.name for folder in known)
    if name is None:
        if len(known) == 1:
            return known[0]
        if not known:
            raise UsageError("No service is deployed here.", hint="'powerband deploy' starts one.", param="name")
        raise UsageError(f"There are several services: {names}.", hint="Name one with --name.", param="name")
    folder = ServiceFolder.of(name)
    if not folder.exists():
        hint = f"Deployed here: {names}." if names else "Nothing is deployed here."
        raise UsageError(f"There is no service {name!r}.", hint=hint, param="name")
    return folder


def endpoint(name: str | None) -> tuple[str, str]:
    """A service's gateway and its admin key. Raises as find_service, and EnvironmentFault too early."""
    folder = find_service(name)
    status = folder.status()
    if status is None or not folder.admin_key.exists():
        raise EnvironmentFault(f"The gateway of {folder.name} was not started yet.", param="name")
    return status.gateway.url, folder.admin_key.read_text().strip()


@contextlib.contextmanager
def lock(path: Path, *, wait_s: float = 0.0) -> Iterator[int]:
    """Hold the file's lock; the kernel releases it when the process ends, however it does.

    Raises BlockingIOError when it is still taken after `wait_s`: its holder may be stopped, and wait for ever.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline_s = time.monotonic() + wait_s
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline_s:
                    raise
                time.sleep(_LOCK_POLL_S)
        yield descriptor
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object, *, durable: bool = True) -> None:
    """All or nothing; with `durable` also where the machine stops in between."""
    data = msgspec.json.format(msgspec.json.encode(value), indent=1)
    write_atomically(path, data, durable=durable, private=True)


def _read(path: Path, kind: type[Kind]) -> Kind | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as problem:
        raise EnvironmentFault(f"{path} is damaged: {problem}.", hint=_DAMAGED, param="name") from None
