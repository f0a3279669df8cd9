"""The account database: one SQLite file, written by one thread, so that no request waits for a disk.

    event loop ── write(sql, row) ─► changes (keys, audit) ─┐                       ┌─► SQLite (WAL)
               ── Buffer.add(row) ─► bounded buffers ───────┴─► writer thread ──────┘   every 0.5 s or 200 rows

Rows that cannot be written now (disk full, file locked) wait in order until they can. Readers use their own connections
and see committed rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from powerband.errors import EnvironmentFault, PowerbandError
from powerband.files import make_private_folder
from powerband.folders import WRITABLE_STATE
from powerband.gateway.accounts.schema import CHANGES, SCHEMA, VERSION

logger = logging.getLogger(__name__)

WRITE_EVERY_S = 0.5
WRITE_ROWS = 200
MAX_CHANGES = 10_000
_BATCH = 2_000
_MAX_PAUSE_S = 5.0
_BUSY_S = 1.0
_LOCK_S = 2.0
_WRITE_S = 1.0  # how long a query waits for what was queued before it
# Errors of a row, or of preparing it, rather than of the disk or the file: it would fail again.
BAD_ROW = (
    *(sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError, sqlite3.ProgrammingError),
    *(ArithmeticError, LookupError, TypeError, ValueError, RecursionError),
)

Row = Sequence[Any]
Run = Callable[[str, Sequence[Row]], None]  # one statement for each row, in one transaction; raises sqlite3.Error
Found = TypeVar("Found")


class StoreUnavailable(PowerbandError):
    """The account database cannot be written or read now (HTTP 503)."""

    http_status = 503
    default_code = "store_unavailable"
    retry_after_s = 5.0


class WriteBuffer:
    """Rows that wait to be written by one statement. Beyond `limit` new rows are counted and go to `on_overflow`."""

    def __init__(
        self,
        sql: str,
        limit: int,
        wake: Callable[[], None],
        *,
        on_overflow: Callable[[Row], None] | None = None,
        prepare: Callable[[Row], Row] | None = None,
    ) -> None:
        self.sql = sql
        self.limit = limit
        self.rows: deque[Row] = deque()
        self.written = 0
        self.dropped = 0
        self.prepare = prepare  # runs in the writer's thread
        self._on_overflow = on_overflow
        self._wake = wake

    def add(self, row: Row) -> bool:
        """False: the buffer is full."""
        if len(self.rows) >= self.limit:
            self.drop(row)
            return False
        self.rows.append(row)
        if len(self.rows) == WRITE_ROWS:
            self._wake()
        return True

    def drop(self, row: Row) -> None:
        self.dropped += 1
        if self._on_overflow is not None:
            self._on_overflow(row)


@dataclass(slots=True)
class _PeriodicTask:
    work: Callable[[Run], None]
    every_s: float
    erases: bool
    due_s: float = 0.0  # time.monotonic()


class Store:
    """Owns the file. Raises EnvironmentFault when it cannot be opened, or when another process has it open.

    path: created with mode 0600 if missing. The process holds a lock on a file beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failing_since: float | None = None  # time.time()
        self._changes: deque[tuple[str, Row, Future[None]]] = deque()
        self._buffers: list[WriteBuffer] = []
        self._tasks: list[_PeriodicTask] = []
        self._erasing = True
        self._barriers: deque[Future[None]] = deque()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._lock_file = _lock(path)
        try:
            self._connection = _open(path)
        except (sqlite3.Error, OSError) as error:
            os.close(self._lock_file)
            hint = "Move the file away to start with an empty database, or restore a copy of it."
            why = error.strerror if isinstance(error, OSError) else error
            raise EnvironmentFault(f"Cannot open the gateway's database {path}: {why}.", hint=hint) from error
        self._thread = threading.Thread(target=self._run, name="database writer", daemon=True)
        self._thread.start()

    def buffer(
        self,
        sql: str,
        limit: int,
        *,
        on_overflow: Callable[[Row], None] | None = None,
        prepare: Callable[[Row], Row] | None = None,
    ) -> WriteBuffer:
        made = WriteBuffer(sql, limit, self._wake.set, on_overflow=on_overflow, prepare=prepare)
        self._buffers.append(made)
        return made

    def add_periodic(self, work: Callable[[Run], None], every_s: float = 0.0, *, erases: bool = False) -> None:
        """Have the writer's thread call `work` at the start, and then in each of its rounds or every `every_s`.

        erases: what it deletes is also erased from the files.
        """
        self._tasks.append(_PeriodicTask(work, every_s, erases))

    def write(self, sql: str, row: Row) -> Future[None]:
        """Queue a change that must not be lost while the process runs; `saved` waits for it. Raises StoreUnavailable.

        Buffered rows are written first. What it deletes is also erased from the files.
        """
        if len(self._changes) >= MAX_CHANGES or self._closing.is_set():
            raise StoreUnavailable("The gateway's database cannot be written now.")
        written: Future[None] = Future()
        self._changes.append((sql, tuple(row), written))
        self._wake.set()
        return written

    def flush(self) -> Future[None]:
        """Done when everything that was queued before is on disk."""
        barrier: Future[None] = Future()
        self._barriers.append(barrier)
        self._wake.set()
        return barrier

    async def saved(self, timeout_s: float = 5.0) -> None:
        """Wait until everything that was queued is on disk. Raises StoreUnavailable when that takes longer."""
        try:
            await asyncio.wait_for(asyncio.wrap_future(self.flush()), timeout_s)
        except TimeoutError:
            hint = "It is in effect in this process, and will be written as soon as possible."
            raise StoreUnavailable("The change is not on disk yet.", hint=hint) from None

    def read(self, function: Callable[[sqlite3.Connection], Found]) -> Found:
        """The function's result, from a read-only connection. Blocks: not for the event loop."""
        try:
            with contextlib.closing(connect_read_only(self.path)) as connection:
                return function(connection)
        except sqlite3.Error as error:
            raise StoreUnavailable(f"The gateway's database cannot be read now: {error}.") from error

    async def query(self, function: Callable[[sqlite3.Connection], Found]) -> Found:
        """`read` in another thread."""
        return await asyncio.to_thread(self.read, function)

    async def read_latest(self, function: Callable[[sqlite3.Connection], Found]) -> Found:
        """`query` that also finds what was queued before it, unless that cannot be written now."""
        with contextlib.suppress(StoreUnavailable):
            await self.saved(_WRITE_S)
        return await self.query(function)

    def close(self, timeout_s: float = 5.0) -> None:
        """Write buffered rows, for at most about `timeout_s`, and log how many are lost."""
        if self._closing.is_set():
            return
        with contextlib.suppress(TimeoutError):
            self.flush().result(timeout_s)
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)
        lost = sum(len(buffer.rows) for buffer in self._buffers) + len(self._changes)
        if lost:
            logger.error("The gateway's database could not be written: %d rows are lost.", lost)
        os.close(self._lock_file)

    def _run(self) -> None:
        pause_s = 0.1
        while not self._closing.is_set():
            self._wake.wait(WRITE_EVERY_S)
            self._wake.clear()
            try:
                self._write_all()
                pause_s = 0.1
                if self.failing_since is not None:
                    logger.warning("The gateway's database can be written again.")
                    self.failing_since = None
            except Exception as error:  # of any kind: this thread must try again
                if self.failing_since is None:
                    self.failing_since = time.time()
                    why = str(error) if isinstance(error, sqlite3.Error) else type(error).__name__
                    logger.error("The gateway's database cannot be written: %s. Rows wait in memory.", why)
                self._closing.wait(pause_s)
                pause_s = min(2 * pause_s, _MAX_PAUSE_S)
        with contextlib.suppress(sqlite3.Error):
            self._close_connection()

    def _close_connection(self) -> None:
        """Move everything into the main file, and keep the other files, empty: on a full disk the next start could not
        create them. SQLite deletes them with the last connection, unless that is read-only.
        """
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with contextlib.closing(connect_read_only(self.path)) as last:
            last.execute("SELECT count(*) FROM audit").fetchone()
            self._connection.close()

    def _write_all(self) -> None:
        barriers = [self._barriers.popleft() for _ in range(len(self._barriers))]
        try:
            for buffer in self._buffers:
                for _ in range(0, len(buffer.rows), _BATCH):
                    self._write_rows(buffer)
            self._write_changes()
            for task in self._tasks:
                if time.monotonic() >= task.due_s:
                    task.work(self._execute)
                    task.due_s = time.monotonic() + task.every_s
                    self._erasing |= task.erases
            if self._erasing:  # deleted rows must also leave the write-ahead log; a reader can delay that
                self._erasing = bool(self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])
        except BaseException:
            self._barriers.extendleft(reversed(barriers))
            raise
        for barrier in barriers:
            if barrier.set_running_or_notify_cancel():
                barrier.set_result(None)

    def _write_changes(self) -> None:
        while self._changes:
            sql, row, written = self._changes[0]
            failure: Exception | None = None
            try:
                self._execute(sql, [row])
                self._erasing |= sql.startswith("DELETE")
            except BAD_ROW as error:
                failure = error
                logger.error("The database rejects a change: %s.", type(error).__name__)
            self._changes.popleft()
            if written.set_running_or_notify_cancel():
                written.set_result(None) if failure is None else written.set_exception(failure)

    def _write_rows(self, buffer: WriteBuffer) -> None:
        """One batch. Rows that the database rejects are dropped and counted."""
        batch = list(islice(buffer.rows, _BATCH))
        try:
            rows = batch if buffer.prepare is None else [buffer.prepare(row) for row in batch]
            self._execute(buffer.sql, rows)
            buffer.written += len(rows)
        except BAD_ROW:
            for row in batch:
                self._write_row(buffer, row)
                buffer.rows.popleft()
            return
        for _ in batch:
            buffer.rows.popleft()

    def _write_row(self, buffer: WriteBuffer, row: Row) -> None:
        try:
            self._execute(buffer.sql, [row if buffer.prepare is None else buffer.prepare(row)])
            buffer.written += 1
        except BAD_ROW as error:
            logger.error("The database rejects a row: %s.", type(error).__name__)
            buffer.dropped += 1

    def _execute(self, sql: str, rows: Sequence[Row]) -> None:
        """One statement for each row, all or none of them."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            self._connection.executemany(sql, rows)
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise


def connect_read_only(path: Path) -> sqlite3.Connection:
    """Raises sqlite3.Error."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_BUSY_S)


def _open(path: Path) -> sqlite3.Connection:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite gives its other files the same mode
    connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    # FULL: committed rows survive a power loss. secure_delete: deleted rows are overwritten.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > VERSION:
        connection.close()
        raise sqlite3.DatabaseError(f"it has version {version}, of a newer Powerband")
    if version != VERSION:  # otherwise write nothing, so that the start succeeds on a full disk
        changes = [CHANGES[older] for older in range(version or VERSION, VERSION)]
        connection.executescript("".join(("BEGIN IMMEDIATE;", *changes, SCHEMA, "COMMIT;")))
    return connection


def _lock(path: Path) -> int:
    """Prevent a second gateway on this file: two would not see each other's reservations."""
    try:
        make_private_folder(path.parent)
        file = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        hint = f"{WRITABLE_STATE} Or name another file with --database."
        raise EnvironmentFault(f"Cannot open the gateway's database {path}: {error.strerror}.", hint=hint) from error
    give_up_at = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError:
            if time.monotonic() > give_up_at:
                os.close(file)
                hint = "Stop the other gateway, or use another file with --database."
                raise EnvironmentFault(f"The gateway's database {path} is in use.", hint=hint) from None
            time.sleep(0.05)
