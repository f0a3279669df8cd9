"""The folder of a service: its files, their locks, and who writes which.

desired.json     the desired state       written under desired.lock, by commands (and by the controller's remediation)
status.json      the observed state      written by the controller
controller.lock  held by the running controller; its modification time is the last heartbeat
members/         the instances that the local target started (fleet.targets.local)
events.json      what happened            written by the controller, as is incidents.json
admin.key        the gateway's first admin key, readable by this user only
gateway.db       the gateway's keys, usage and audit log
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Literal, TypeVar

import msgspec

from powerband.errors import EnvironmentFault, UsageError
from powerband.files import make_private_folder, open_regular, set_aside, write_atomically
from powerband.fleet.service.spec import ServiceSpec
from powerband.fleet.service.status import ServiceStatus
from powerband.folders import WRITABLE_STATE, state_home

logger = logging.getLogger(__name__)

Kind = TypeVar("Kind")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
HEARTBEAT_TIMEOUT_S = 5.0  # without a heartbeat for so long, a controller counts as hung; it sends several a second
_LOCK_POLL_S = 0.02
_LOCK_TIMEOUT_S = 20.0  # for another command to finish its change
NO_SERVICE_HINT = "'powerband deploy PLAN' starts one."
_DAMAGED = "Remove the service with 'powerband remove', or delete the file."


@dataclass(frozen=True, slots=True)
class ServiceStore:
    """The files of one service."""

    path: Path

    @classmethod
    def named(cls, name: str) -> ServiceStore:
        """Raises UsageError for an invalid name."""
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"Invalid service name {name!r}.",
                hint="Use lower-case letters, digits, '.', '_' and '-', at most 63 characters.",
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

    def read_admin_key(self) -> str:
        """Raises EnvironmentFault when it cannot be read, or is damaged."""
        try:
            with open_regular(self.admin_key) as file:
                return file.readall().decode("ascii").strip()
        except UnicodeDecodeError:
            raise EnvironmentFault(f"{self.admin_key} is damaged.", hint=_DAMAGED, param="name") from None
        except OSError as problem:
            raise _unusable(self.admin_key, problem) from None

    @property
    def incidents(self) -> Path:
        return self.path / "incidents.json"

    @property
    def events(self) -> Path:
        return self.path / "events.json"

    @property
    def gateway_store(self) -> ServiceStore:
        """Of the service whose gateway serves this one's model: usually of this one."""
        spec = self.read_spec()
        return ServiceStore.named(spec.gateway_service) if spec is not None and spec.gateway_service else self

    def create(self) -> None:
        """Make the folder. Raises EnvironmentFault."""
        try:
            make_private_folder(self.logs)
            self.path.chmod(0o700)
        except OSError as problem:
            raise self._cannot_keep(problem) from None

    def check_can_be_kept(self) -> None:
        """Whether `create` could make the folder, before minutes of planning. Raises EnvironmentFault."""
        try:
            folder = next(one for one in (self.path, *self.path.parents) if one.exists())
            with NamedTemporaryFile(dir=folder):
                pass
        except OSError as problem:
            raise self._cannot_keep(problem) from None

    def _cannot_keep(self, problem: OSError) -> EnvironmentFault:
        return EnvironmentFault(
            f"Cannot keep state in {self.path}: {problem.strerror}.", hint=WRITABLE_STATE, param="name"
        )

    def exists(self) -> bool:
        """Raises EnvironmentFault where this user may not look into the folder."""
        return _exists(self.path / "desired.json")

    def read_spec(self) -> ServiceSpec | None:
        """None: there is no such service. Raises EnvironmentFault when the file is damaged."""
        return _read(self.path / "desired.json", ServiceSpec)

    def read_status(self) -> ServiceStatus | None:
        """None: no controller has written a status yet, or the file is damaged; the controller writes it again."""
        try:
            return _read(self.path / "status.json", ServiceStatus)
        except EnvironmentFault as problem:
            logger.warning("%s", problem)
            return None

    def has_status(self) -> bool:
        return _exists(self.path / "status.json")

    def set_aside(self, name: str) -> None:
        """Rename a damaged file of the service to NAME.damaged."""
        with contextlib.suppress(OSError):
            logger.warning("The damaged file is kept as %s.", set_aside(self.path / name))

    def write_status(self, status: ServiceStatus) -> None:
        """Raises OSError."""
        write_json(self.path / "status.json", status, durable=False)

    def write_spec(self, spec: ServiceSpec) -> None:
        """Only while holding `lock_spec`. Raises EnvironmentFault."""
        path = self.path / "desired.json"
        try:
            write_json(path, spec)
        except OSError as problem:
            raise EnvironmentFault(f"Cannot write {path}: {problem.strerror}.", param="name") from None

    @contextlib.contextmanager
    def lock_spec(self, wait_s: float = _LOCK_TIMEOUT_S) -> Iterator[None]:
        """One change at a time. Raises EnvironmentFault when another command holds the lock for more than `wait_s`."""
        self.create()
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
        """hung: a process holds the controller's lock, but has sent no heartbeat for HEARTBEAT_TIMEOUT_S.

        Raises EnvironmentFault where this user may not open the lock.
        """
        if not _exists(self.controller_lock):
            return "none"
        try:
            with lock(self.controller_lock):
                return "none"
        except BlockingIOError:
            is_hung = abs(time.time() - self.last_heartbeat()) > HEARTBEAT_TIMEOUT_S
            return "hung" if is_hung else "alive"

    def controller_alive(self) -> bool:
        return self.controller_state() == "alive"

    def last_heartbeat(self) -> float:
        """The time of the controller's last heartbeat, on time.time()."""
        return self.controller_lock.stat().st_mtime

    def next_number(self) -> int:
        """A number for the next instance's id; never the same twice. Called by the controller only.

        On a full disk the number comes from the clock: microseconds are larger than any count.
        """
        path = self.path / "sequence"
        try:
            number = int(path.read_text()) + 1 if path.exists() else 1
            write_atomically(path, str(number).encode(), private=True)
        except (OSError, ValueError) as problem:
            logger.warning("Cannot write %s; numbering instances by the clock instead: %s.", path, problem)
            return time.time_ns() // 1000
        return number

    def delete(self, *, purge: bool) -> None:
        """Delete the state of a removed service; the gateway's database only with `purge`."""
        if purge:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        for name in ("members", "logs"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in ("desired.json", "status.json", "routes.json", "events.json", "incidents.json"):
            (self.path / name).unlink(missing_ok=True)


def services() -> list[ServiceStore]:
    """All services of this user, by name. Raises EnvironmentFault where this user may not look into their folders."""
    home = state_home()
    try:
        found = [ServiceStore(path) for path in home.iterdir() if path.is_dir()] if home.is_dir() else []
    except OSError as problem:
        raise _unusable(home, problem) from None
    return sorted((folder for folder in found if folder.exists()), key=lambda folder: folder.name)


def find_service(name: str | None, old_flag: str | None = None) -> ServiceStore:
    """The service with this name; without a name, the only one. Raises EnvironmentFault if there is none, with the
    names of the others, and UsageError if there are several.

    old_flag: the name from --name or --service, which commands had before they took it as an argument.
    """
    if name is not None and old_flag is not None and name != old_flag:
        raise UsageError(f"Two services are named: {name} and {old_flag}.", hint="Name one.", param="name")
    name = name if name is not None else old_flag
    known = services()
    names = ", ".join(folder.name for folder in known)
    if name is None:
        if len(known) == 1:
            return known[0]
        if not known:
            raise EnvironmentFault("No service is deployed.", hint=NO_SERVICE_HINT, param="name")
        raise UsageError(
            f"There are several services: {names}.",
            hint=f"Name one right after the command, as in 'powerband status {known[0].name}'.",
            param="name",
        )
    folder = ServiceStore.named(name)
    if not folder.exists():
        hint = f"Deployed: {names}." if names else f"No service is deployed. {NO_SERVICE_HINT}"
        raise EnvironmentFault(f"There is no service {name!r}.", hint=hint, param="name")
    return folder


def split_operands(words: Sequence[str], old_flag: str | None, operands: int) -> tuple[ServiceStore, Sequence[str]]:
    """'[SERVICE] OPERAND…' of a command line: the service, and the other words.

    operands: how many words follow the service's name. Raises as find_service, and UsageError for more words.
    """
    name, rest = (words[0], words[1:]) if len(words) > operands else (None, words)
    if len(rest) > operands:
        raise UsageError(f"Unexpected: {' '.join(rest[operands:])}.")
    return find_service(name, old_flag), rest


def endpoint(name: str | None, old_flag: str | None = None) -> tuple[str, str]:
    """URL of a service's gateway, and its admin key. Raises as find_service, and EnvironmentFault before its start."""
    folder = find_service(name, old_flag)
    folder = folder.gateway_store
    status = folder.read_status()
    if status is None or not _exists(folder.admin_key):
        raise EnvironmentFault(f"The gateway of {folder.name} has not started yet.", param="name")
    return status.gateway.url, folder.read_admin_key()


def services_behind(owner: ServiceStore) -> list[ServiceStore]:
    """The other services whose models the gateway of this one serves."""
    specs = [(store, store.read_spec()) for store in services()]
    return [store for store, spec in specs if spec is not None and spec.gateway_service == owner.name]


@contextlib.contextmanager
def lock(path: Path, *, wait_s: float = 0.0) -> Iterator[int]:
    """Hold the file's lock; the kernel releases it when the process ends.

    Raises BlockingIOError when another process still holds it after `wait_s`, and EnvironmentFault when the file cannot
    be opened: another user's, a read-only disk.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as problem:
        raise _unusable(path, problem) from None
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
    """Atomically; with `durable` also across a power loss. Raises OSError."""
    data = msgspec.json.format(msgspec.json.encode(value), indent=1)
    write_atomically(path, data, durable=durable, private=True)


def _read(path: Path, kind: type[Kind]) -> Kind | None:
    try:
        with open_regular(path) as file:
            return msgspec.json.decode(file.readall(), type=kind)
    except FileNotFoundError:
        return None
    except PermissionError as problem:
        raise _unusable(path, problem) from None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as problem:
        raise EnvironmentFault(f"{path} is damaged: {problem}.", hint=_DAMAGED, param="name") from None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as problem:
        raise _unusable(path, problem) from None


def _unusable(path: Path, problem: OSError) -> EnvironmentFault:
    return EnvironmentFault(
        f"Cannot use {path}: {problem.strerror}.",
        hint="Run the command as the user who deployed the service, or name another state folder with POWERBAND_STATE.",
        param="name",
    )
