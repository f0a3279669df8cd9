"""This machine as a target: instances are processes in sessions of their own, which outlive the controller.

The record of an instance is written before its process starts, and the process carries the record's path in its
environment. So a controller that crashes between the two leaves nothing that the next one cannot find.
"""

from __future__ import annotations

import logging
import math
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
    oom_kills,
    resident_bytes,
    session_leader_with,
    session_processes,
    signal_session,
    was_rebooted_since,
)
from powerband.spec.hardware.device import usable_memory
from powerband.web.listening import free_port

logger = logging.getLogger(__name__)

# In an instance's environment: the path of its record. This name and that of the folder are those of the versions
# before, whose instances may still run.
INSTANCE_TAG = "POWERBAND_MEMBER"
_RECORDS = "members"
# An instance gets its settings only from its command line; it inherits only these of the user's POWERBAND_ variables.
INHERITED_VARIABLES = (
    *("POWERBAND_CACHE", "POWERBAND_DEVICE_PROFILE", "POWERBAND_HERE", "POWERBAND_DEBUG"),
    *("POWERBAND_KERNEL_TIER", "POWERBAND_KERNEL_SANITIZE"),
)
MAX_KEPT_LOGS = 20
LAST_LINES = 12
_OOM_RECENT_S = 5.0  # the kernel counts a kill before the process has exited
_MEMORY_MARGIN = 1.1  # one more replica needs this multiple of the largest replica's memory
_SET_ASIDE = ".unreadable"  # suffix of a record that could not be decoded


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """The file of one instance."""

    id: str
    role: Role
    revision: str
    pool: int
    url: str
    started_at: float
    ready_path: str
    metrics_path: str = "/metrics"
    devices: tuple[int, ...] = ()
    process: ProcessId | None = None  # None: not known yet
    stop_by: float | None = None  # when it is killed, on time.time()


class LocalTarget:
    """Processes of this machine. folder: of the service; this class owns members/ and logs/ in it."""

    def __init__(self, folder: Path) -> None:
        self._records = folder / _RECORDS
        self._logs = folder / "logs"
        for path in (self._records, self._logs):
            make_private_folder(path)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._unwritten: dict[str, _Record] = {}  # newer than their files, because writing failed
        self._exited: list[ExitedInstance] = []
        self._oom_kills = oom_kills()  # when it was read last
        self._oom_killed_s = -math.inf  # when that last grew, on time.monotonic()

    def start(self, spec: InstanceSpec) -> Instance:
        port = spec.port if spec.port is not None else self._free_port(spec.host)
        record = _Record(
            id=spec.id,
            role=spec.role,
            revision=spec.revision,
            pool=spec.pool,
            url=f"http://{_reachable(spec.host)}:{port}",
            started_at=time.time(),
            ready_path=spec.ready_path,
            metrics_path=spec.metrics_path,
            devices=spec.devices,
        )
        self._write(record)
        try:
            process = self._spawn(spec, port)
        except OSError as problem:
            self._delete(spec.id)
            raise EnvironmentFault(
                f"Cannot start {spec.command[0]}: {problem.strerror}.", hint="Is it installed?", param="engine"
            ) from None
        self._children[spec.id] = process
        record = replace(record, process=identify(process.pid))
        self._write(record)
        self._delete_old_logs()
        return _instance(record)

    def list_instances(self) -> Sequence[Instance]:
        found = []
        self._watch_oom_kills()
        for unwritten in tuple(self._unwritten.values()):
            self._write(unwritten)
        for path in self._paths():
            try:
                record = self._load(path)
            except ValueError as problem:
                self._set_aside(path, problem)
                continue
            if record is None:
                continue
            if record.process is None or not is_alive(record.process):
                self._reap(record)
                continue
            if record.stop_by is not None and time.time() >= record.stop_by:
                signal_session(record.process.pid, self._tag(record.id), signal.SIGKILL)
            found.append(_instance(record))
        return found

    def take_exited(self) -> Sequence[ExitedInstance]:
        taken, self._exited = self._exited, []
        return taken

    def stop(self, id: str, grace_s: float) -> None:
        record = self._read(self._path(id))
        if record is None or record.process is None:
            return
        stop_by = time.time() + grace_s
        is_first = record.stop_by is None
        if is_first or stop_by < (record.stop_by or 0.0) - 1.0:
            self._write(replace(record, stop_by=stop_by))
        if grace_s <= 0:
            signal_session(record.process.pid, self._tag(record.id), signal.SIGKILL)
        elif is_first and is_alive(record.process):
            with suppress(ProcessLookupError):
                os.kill(record.process.pid, signal.SIGTERM)

    def log(self, id: str) -> Path | None:
        path = self._logs / f"{id}.log"
        return path if path.exists() else None

    def devices_in_use(self) -> frozenset[int]:
        return devices_of_other_services(self._records.parent)

    def has_room_for_replica(self) -> bool:
        sizes = [
            sum(map(resident_bytes, session_processes(record.process.pid, self._tag(record.id))))
            for path in self._paths()
            if (record := self._read(path)) is not None and record.role == "replica" and record.process is not None
        ]
        _, available = usable_memory()
        return available > _MEMORY_MARGIN * max(sizes, default=0)

    # ---- processes

    def _spawn(self, spec: InstanceSpec, port: int) -> subprocess.Popen[bytes]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("POWERBAND_") or name in INHERITED_VARIABLES
        }
        command = [part.replace("{port}", str(port)) for part in spec.command]
        with self._open_log(spec.id) as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**inherited, **spec.env, INSTANCE_TAG: str(self._path(spec.id))},
                start_new_session=True,
            )

    def _open_log(self, id: str) -> BinaryIO:
        """The log file. If it cannot be created (full disk), /dev/null, because the instance must run anyway."""
        try:
            return (self._logs / f"{id}.log").open("ab")
        except OSError as problem:
            logger.warning("No log is kept of %s: %s.", id, problem)
            return open(os.devnull, "ab")

    def _reap(self, record: _Record) -> None:
        """The instance's process has exited: kill its remaining children, and report it."""
        if record.process is not None:
            signal_session(record.process.pid, self._tag(record.id), signal.SIGKILL)
        child = self._children.pop(record.id, None)
        exit_code = None
        if child is not None:
            with suppress(subprocess.TimeoutExpired):
                exit_code = child.wait(1.0)
        self._delete(record.id)
        exited = ExitedInstance(
            record.id,
            exit_code,
            last_lines(self._logs / f"{record.id}.log"),
            exit_expected=record.stop_by is not None,
            oom_killed=exit_code in (None, -signal.SIGKILL) and self._watch_oom_kills(),
            after_reboot=record.process is not None and was_rebooted_since(record.process),
        )
        self._exited.append(exited)

    def _watch_oom_kills(self) -> bool:
        """Whether the kernel has killed a process in the last seconds because memory ran out."""
        number, now_s = oom_kills(), time.monotonic()
        if number > self._oom_kills:
            self._oom_killed_s = now_s
        self._oom_kills = number
        return now_s - self._oom_killed_s < _OOM_RECENT_S

    def _free_port(self, host: str) -> int:
        """A free port that no recorded instance uses: one that is just starting may not listen yet."""
        taken = {record.url.rpartition(":")[2] for path in self._paths() if (record := self._read(path))}
        while True:
            port = free_port(host)
            if str(port) not in taken:
                return port

    # ---- records

    def _path(self, id: str) -> Path:
        return self._records / f"{id}.json"

    def _tag(self, id: str) -> EnvironmentTag:
        return EnvironmentTag(INSTANCE_TAG, str(self._path(id)))

    def _paths(self) -> list[Path]:
        """Of all records, including those whose file is not written yet."""
        return sorted({*self._records.glob("*.json"), *map(self._path, self._unwritten)})

    def _write(self, record: _Record) -> None:
        """Write a record. If that fails, it is kept in memory and written as soon as possible."""
        try:
            write_json(self._path(record.id), record)
            self._unwritten.pop(record.id, None)
        except OSError as problem:
            if record.id not in self._unwritten:
                logger.warning("The record of %s is not on disk yet: %s.", record.id, problem)
            self._unwritten[record.id] = record

    def _delete(self, id: str) -> None:
        self._unwritten.pop(id, None)
        self._path(id).unlink(missing_ok=True)

    def _read(self, path: Path) -> _Record | None:
        """None: it is gone, or cannot be decoded, which `list_instances` deals with."""
        with suppress(ValueError):
            return self._load(path)
        return None

    def _load(self, path: Path) -> _Record | None:
        """None: it is gone. Raises ValueError if it cannot be decoded. A completed record is written."""
        if (unwritten := self._unwritten.get(path.stem)) is not None:
            return unwritten
        stored = _decode(path)
        record = stored and _completed(stored, path)
        if record is not None and record is not stored:
            self._write(record)
        return record

    def _set_aside(self, path: Path, problem: ValueError) -> None:
        """Kill the instance of a record that cannot be decoded, because it cannot be managed, and keep the file."""
        kept = path.with_suffix(_SET_ASIDE)
        os.replace(path, kept)
        tag = self._tag(path.stem)
        process = session_leader_with(tag)
        if process is not None:
            signal_session(process.pid, tag, signal.SIGKILL)
        ended = "it has no process" if process is None else f"its process {process.pid} was killed"
        logger.warning("The record of the instance %s cannot be read (%s): %s. See %s", path.stem, problem, ended, kept)
        log = last_lines(self._logs / f"{path.stem}.log")
        self._exited.append(ExitedInstance(path.stem, None, log, exit_expected=False))

    def _delete_old_logs(self) -> None:
        logs = sorted(self._logs.glob("*[0-9].log"), key=lambda path: path.stat().st_mtime)
        for path in logs[:-MAX_KEPT_LOGS]:
            if not self._path(path.stem).exists():
                path.unlink(missing_ok=True)


def devices_of_other_services(service: Path) -> frozenset[int]:
    """Accelerators that instances of other services use. service: the folder of this one, which need not exist yet."""
    others = (path for path in service.parent.glob(f"*/{_RECORDS}/*.json") if path.parent.parent != service)
    records = (record for path in others if (record := _read_record(path)) is not None)
    alive = (one for one in records if one.process is not None and is_alive(one.process))
    return frozenset(device for record in alive for device in record.devices)


def running_instances(service: Path) -> frozenset[str]:
    """Ids of the instances whose processes run, of a service whose controller may be gone. Changes nothing."""
    records = (_read_record(path) for path in (service / _RECORDS).glob("*.json"))
    alive = (record for record in records if record is not None and record.process is not None)
    return frozenset(record.id for record in alive if record.process is not None and is_alive(record.process))


def _read_record(path: Path) -> _Record | None:
    """The record of another service, which stays as it is. None: it is gone, or cannot be decoded."""
    try:
        record = _decode(path)
    except ValueError as problem:
        logger.warning("The record %s of another service cannot be read: %s", path, problem)
        return None
    return record and _completed(record, path)


def _decode(path: Path) -> _Record | None:
    """None: it is gone. Raises ValueError if it cannot be decoded."""
    try:
        record = msgspec.json.decode(path.read_bytes(), type=_Record)
    except FileNotFoundError:
        return None
    except RecursionError as problem:
        raise ValueError(str(problem)) from None
    if record.id != path.stem:
        raise ValueError(f"it is of {record.id!r}")
    return record


def _completed(record: _Record, path: Path) -> _Record:
    """A record without its process is completed from the process's own environment."""
    if record.process is None and (process := session_leader_with(EnvironmentTag(INSTANCE_TAG, str(path)))) is not None:
        return replace(record, process=process)
    return record


def last_lines(path: Path, count: int = LAST_LINES) -> str:
    """The last lines of a log, at most 64 KiB."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(file.tell() - (1 << 16), 0))
            content = file.read()
    except OSError:
        return ""
    return "\n".join(content.decode(errors="replace").splitlines()[-count:])


def _instance(record: _Record) -> Instance:
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
        metrics_path=record.metrics_path,
        devices=record.devices,
    )


def _reachable(host: str) -> str:
    """The address under which this machine reaches a server that listens on `host`."""
    if host in ("", "0.0.0.0"):  # noqa: S104 - compared with, not listened on
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host
