"""This machine as a target: members are processes in sessions of their own, which outlive whoever started them.

A member's record is written before it is started, and its process carries the record's name in its environment. So a
controller that dies between the two leaves nothing that the next one could not find.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import msgspec

from powerband.errors import EnvironmentFault
from powerband.files import make_private_folder
from powerband.fleet.service.store import write_json
from powerband.fleet.targets.base import ExitedInstance, Instance, InstanceSpec, Role
from powerband.fleet.targets.processes import (
    EnvironmentTag,
    ProcessId,
    identify,
    is_alive,
    memory_available_bytes,
    session_leader_with,
    session_members,
    signal_session,
)
from powerband.web.listening import free_port

logger = logging.getLogger(__name__)

INSTANCE_TAG = "POWERBAND_MEMBER"  # in a member's environment: its record's path
# Settings of the user's shell are not a plan's: a member gets those of its command line alone.
INHERITED_VARIABLES = (
    *("POWERBAND_CACHE", "POWERBAND_HERE", "POWERBAND_DEBUG"),
    *("POWERBAND_KERNEL_TIER", "POWERBAND_KERNEL_SANITIZE"),
)
MAX_KEPT_LOGS = 20
LAST_LINES = 12
_MEMORY_MARGIN = 1.1  # on the memory of a replica, for one more


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """Of one member. process: None until it is known. stop_by: when it is killed, on time.time()."""

    id: str
    role: Role
    revision: str
    pool: int
    url: str
    started_at: float
    ready_path: str
    devices: tuple[int, ...] = ()
    process: ProcessId | None = None
    stop_by: float | None = None


class LocalTarget:
    """Processes of this machine. folder: of the service; members/ and logs/ in it are this class's."""

    def __init__(self, folder: Path) -> None:
        self._members = folder / "members"
        self._logs = folder / "logs"
        for path in (self._members, self._logs):
            make_private_folder(path)
        self._own: dict[str, subprocess.Popen[bytes]] = {}
        self._unwritten: dict[str, _Record] = {}  # newer than their files: the disk did not take them
        self._gone: list[ExitedInstance] = []

    def start(self, launch: InstanceSpec) -> Instance:
        port = launch.port if launch.port is not None else self._free_port(launch.host)
        url = f"http://{_reachable(launch.host)}:{port}"
        record = _Record(
            id=launch.id,
            role=launch.role,
            revision=launch.revision,
            pool=launch.pool,
            url=url,
            started_at=time.time(),
            ready_path=launch.ready_path,
            devices=launch.devices,
        )
        self._write(record)
        try:
            process = self._spawn(launch, port)
        except OSError as problem:
            self._forget(launch.id)
            raise EnvironmentFault(
                f"Cannot start {launch.command[0]}: {problem.strerror}.", hint="Is it installed?", param="engine"
            ) from None
        self._own[launch.id] = process
        record = replace(record, process=identify(process.pid))
        self._write(record)
        self._forget_old_logs()
        return _shown(record)

    def running(self) -> Sequence[Instance]:
        found = []
        for waiting in tuple(self._unwritten.values()):
            self._write(waiting)
        for path in self._paths():
            record = self._read(path)
            if record is None:
                continue
            if record.process is None or not is_alive(record.process):
                self._bury(record)
                continue
            if record.stop_by is not None and time.time() >= record.stop_by:
                signal_session(record.process.pid, self._mark(record.id), signal.SIGKILL)
            found.append(_shown(record))
        return found

    def gone(self) -> Sequence[ExitedInstance]:
        found, self._gone = self._gone, []
        return found

    def stop(self, id: str, grace_s: float) -> None:
        record = self._read(self._path(id))
        if record is None or record.process is None:
            return
        stop_by = time.time() + grace_s
        is_first = record.stop_by is None
        if is_first or stop_by < (record.stop_by or 0.0) - 1.0:
            self._write(replace(record, stop_by=stop_by))
        if grace_s <= 0:
            signal_session(record.process.pid, self._mark(record.id), signal.SIGKILL)
        elif is_first and is_alive(record.process):
            with suppress(ProcessLookupError):
                os.kill(record.process.pid, signal.SIGTERM)

    def log(self, id: str) -> Path | None:
        path = self._logs / f"{id}.log"
        return path if path.exists() else None

    def taken_devices(self) -> frozenset[int]:
        others = (path for path in self._members.parent.parent.glob("*/members/*.json") if path.parent != self._members)
        records = (record for path in others if (record := self._read(path)) is not None)
        alive = (one for one in records if one.process is not None and is_alive(one.process))
        return frozenset(device for record in alive for device in record.devices)

    def room_for_one_more(self) -> bool:
        sizes = [
            sum(stat.resident_bytes for stat in session_members(record.process.pid, self._mark(record.id)))
            for path in self._paths()
            if (record := self._read(path)) is not None and record.role == "replica" and record.process is not None
        ]
        return memory_available_bytes() > _MEMORY_MARGIN * max(sizes, default=0)

    # ---- processes

    def _spawn(self, launch: InstanceSpec, port: int) -> subprocess.Popen[bytes]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("POWERBAND_") or name in INHERITED_VARIABLES
        }
        command = [part.replace("{port}", str(port)) for part in launch.command]
        with self._open_log(launch.id) as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**kept, **launch.env, INSTANCE_TAG: str(self._path(launch.id))},
                start_new_session=True,
            )

    def _open_log(self, id: str) -> BinaryIO:
        """Nowhere, where the disk has no room for one more file: what writes there has to run all the same."""
        try:
            return (self._logs / f"{id}.log").open("ab")
        except OSError as problem:
            logger.warning("What %s says is lost: %s.", id, problem)
            return open(os.devnull, "ab")

    def _bury(self, record: _Record) -> None:
        """It ended: nothing of it may be left, and whoever asks is told."""
        if record.process is not None:
            signal_session(record.process.pid, self._mark(record.id), signal.SIGKILL)
        own = self._own.pop(record.id, None)
        exit_code = None
        if own is not None:
            with suppress(subprocess.TimeoutExpired):
                exit_code = own.wait(1.0)
        self._forget(record.id)
        self._gone.append(ExitedInstance(record.id, exit_code, last_lines(self._logs / f"{record.id}.log")))

    def _free_port(self, host: str) -> int:
        """One that the system says is free, and no member has kept."""
        taken = {record.url.rpartition(":")[2] for path in self._paths() if (record := self._read(path))}
        while True:
            port = free_port(host)
            if str(port) not in taken:
                return port

    # ---- records

    def _path(self, id: str) -> Path:
        return self._members / f"{id}.json"

    def _mark(self, id: str) -> EnvironmentTag:
        return EnvironmentTag(INSTANCE_TAG, str(self._path(id)))

    def _paths(self) -> list[Path]:
        """Of all records, also of those whose file is not there yet."""
        return sorted({*self._members.glob("*.json"), *map(self._path, self._unwritten)})

    def _write(self, record: _Record) -> None:
        """What the disk does not take is kept in memory, and written as soon as it can be."""
        try:
            write_json(self._path(record.id), record)
            self._unwritten.pop(record.id, None)
        except OSError as problem:
            if record.id not in self._unwritten:
                logger.warning("The record of %s is not on disk yet: %s.", record.id, problem)
            self._unwritten[record.id] = record

    def _forget(self, id: str) -> None:
        self._unwritten.pop(id, None)
        self._path(id).unlink(missing_ok=True)

    def _read(self, path: Path) -> _Record | None:
        """None: it is gone. A record without its process is completed from the process's own environment."""
        if (unwritten := self._unwritten.get(path.stem)) is not None and path.parent == self._members:
            return unwritten
        try:
            record = msgspec.json.decode(path.read_bytes(), type=_Record)
        except FileNotFoundError:
            return None
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            path.unlink(missing_ok=True)
            return None
        if record.process is None:
            process = session_leader_with(EnvironmentTag(INSTANCE_TAG, str(path)))
            if process is not None:
                record = replace(record, process=process)
                self._write(record)
        return record

    def _forget_old_logs(self) -> None:
        logs = sorted(self._logs.glob("*[0-9].log"), key=lambda path: path.stat().st_mtime)
        for path in logs[:-MAX_KEPT_LOGS]:
            if not self._path(path.stem).exists():
                path.unlink(missing_ok=True)


def last_lines(path: Path, count: int = LAST_LINES) -> str:
    """The end of a log, at most 64 kB of it."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(file.tell() - (1 << 16), 0))
            content = file.read()
    except OSError:
        return ""
    return "\n".join(content.decode(errors="replace").splitlines()[-count:])


def _shown(record: _Record) -> Instance:
    return Instance(
        id=record.id,
        role=record.role,
        revision=record.revision,
        pool=record.pool,
        url=record.url,
        pid=record.process.pid if record.process is not None else 0,
        started_at=record.started_at,
        stopping=record.stop_by is not None,
        ready_path=record.ready_path,
        devices=record.devices,
    )


def _reachable(host: str) -> str:
    """The address under which this machine reaches what listens on `host`."""
    if host in ("", "0.0.0.0"):  # noqa: S104 - compared with, not listened on
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host
