"""The gateway's memory on disk: one SQLite file, written by one thread, so that no request ever waits for a disk.

    event loop ── write(sql, row) ─► changes (keys, audit) ─┐                       ┌─► SQLite (WAL)
               ── Buffer.add(row) ─► bounded buffers ───────┴─► writer thread ──────┘   every 0.5 s or 200 rows

What cannot be written now (disk full, file locked) waits, in its order, until it can. Readers have connections of their
own and see what was committed.
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
from powerband.gateway.accounts.schema import CHANGES, SCHEMA, VERSION

logger = logging.getLogger(__name__)

WRITE_EVERY_S = 0.5
WRITE_ROWS = 200
MAX_CHANGES = 10_000
_BATCH = 2_000
_MAX_PAUSE_S = 5.0
_BUSY_S = 1.0
_LOCK_S = 2.0
# What is wrong with a row, or with making it ready, rather than with the disk or the file: it would be wrong again.
BAD_ROW = (
    *(sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError, sqlite3.ProgrammingError),
    *(ArithmeticError, LookupError, TypeError, ValueError, RecursionError),
)

Row = Sequence[Any]
Run = Callable[[str, Sequence[Row]], None]  # one statement for each row, in one transaction; raises sqlite3.Error
Found = TypeVar("Found")


class StoreUnavailable(PowerbandError):
    """The books cannot be written or read now (HTTP 503)."""

    http_status = 503
    default_code = "store_unavailable"
    retry_after_s = 5.0


class WriteBuffer:
    """Rows that wait to be written by one statement. Beyond `limit` a new row goes to `lose`, and is counted."""

    def __init__(
        self,
        sql: str,
        limit: int,
        wake: Callable[[], None],
        *,
        lose: Callable[[Row], None] | None = None,
        prepare: Callable[[Row], Row] | None = None,
    ) -> None:
        self.sql = sql
        self.limit = limit
        self.rows: deque[Row] = deque()
        self.written = 0
        self.dropped = 0
        self.prepare = prepare  # runs in the writer's thread
        self._lose = lose
        self._wake = wake

    def add(self, row: Row) -> bool:
        """False when there was no room."""
        if len(self.rows) >= self.limit:
            self.drop(row)
            return False
        self.rows.append(row)
        if len(self.rows) == WRITE_ROWS:
            self._wake()
        return True

    def drop(self, row: Row) -> None:
        self.dropped += 1
        if self._lose is not None:
            self._lose(row)


@dataclass(slots=True)
class _PeriodicTask:
    work: Callable[[Run], None]
    every_s: float
    erases: bool
    due_s: float = 0.0  # time.monotonic()


class Store:
    """Owns the file. Raises EnvironmentFault when it cannot be opened, or another process has it.

    path: made with mode 0600 when it is not there. The lock beside it ends with the process that holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failing_since: float | None = None  # time.time()
        self._changes: deque[tuple[str, Row, Future[None]]] = deque()
        self._buffers: list[WriteBuffer] = []
        self._chores: list[_PeriodicTask] = []
        self._erasing = True
        self._barriers: deque[Future[None]] = deque()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._lock_file = _lock(path)
        try:
            self._connection = _open(path)
        except (sqlite3.Error, OSError) as error:
            os.close(self._lock_file)
            hint = "Move the file away to begin with empty books, or restore a copy of it."
            raise EnvironmentFault(f"The gateway's books {path} cannot be opened: {error}.", hint=hint) from error
        self._thread = threading.Thread(target=self._run, name="books", daemon=True)
        self._thread.start()

    def buffer(
        self,
        sql: str,
        limit: int,
        *,
        lose: Callable[[Row], None] | None = None,
        prepare: Callable[[Row], Row] | None = None,
    ) -> WriteBuffer:
        made = WriteBuffer(sql, limit, self._wake.set, lose=lose, prepare=prepare)
        self._buffers.append(made)
        return made

    def also(self, work: Callable[[Run], None], every_s: float = 0.0, *, erases: bool = False) -> None:
        """Have the writer's thread call it with each of its rounds, or every so often, first at the start.

        erases: nothing of what it deletes stays in the files.
        """
        self._chores.append(_PeriodicTask(work, every_s, erases))

    def write(self, sql: str, row: Row) -> Future[None]:
        """A change that must not be lost while the process lives; `saved` waits for it. Raises StoreUnavailable.

        Rows in buffers are written before it. Of what it deletes nothing stays in the files.
        """
        if len(self._changes) >= MAX_CHANGES or self._closing.is_set():
            raise StoreUnavailable("The gateway's books cannot be written now.")
        written: Future[None] = Future()
        self._changes.append((sql, tuple(row), written))
        self._wake.set()
        return written

    def flush(self) -> Future[None]:
        """Done when all that was handed over before is on disk."""
        barrier: Future[None] = Future()
        self._barriers.append(barrier)
        self._wake.set()
        return barrier

    async def saved(self, timeout_s: float = 5.0) -> None:
        """Wait until what was handed over is on disk. Raises StoreUnavailable when that takes longer."""
        try:
            await asyncio.wait_for(asyncio.wrap_future(self.flush()), timeout_s)
        except TimeoutError:
            hint = "It is in effect in this process, and is written as soon as the disk allows it."
            raise StoreUnavailable("The change is not on disk yet.", hint=hint) from None

    def read(self, function: Callable[[sqlite3.Connection], Found]) -> Found:
        """What the function finds, over a connection that cannot write. Blocks: not for the event loop."""
        try:
            with contextlib.closing(connect_read_only(self.path)) as connection:
                return function(connection)
        except sqlite3.Error as error:
            raise StoreUnavailable(f"The gateway's books cannot be read now: {error}.") from error

    async def query(self, function: Callable[[sqlite3.Connection], Found]) -> Found:
        """`read`, beside the event loop."""
        return await asyncio.to_thread(self.read, function)

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what waits, for at most about `timeout_s`; say what was lost."""
        if self._closing.is_set():
            return
        with contextlib.suppress(TimeoutError):
            self.flush().result(timeout_s)
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)
        lost = sum(len(buffer.rows) for buffer in self._buffers) + len(self._changes)
        if lost:
            logger.error("The gateway's books could not be written: %d rows are lost.", lost)
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
                    logger.warning("The gateway's books can be written again.")
                    self.failing_since = None
            except Exception as error:  # whatever it is, this thread has to try again
                if self.failing_since is None:
                    self.failing_since = time.time()
                    why = str(error) if isinstance(error, sqlite3.Error) else type(error).__name__
                    logger.error("The gateway's books cannot be written: %s. Rows wait in memory.", why)
                self._closing.wait(pause_s)
                pause_s = min(2 * pause_s, _MAX_PAUSE_S)
        with contextlib.suppress(sqlite3.Error):
            self._close_connection()

    def _close_connection(self) -> None:
        """The file alone has everything then. Those beside it stay, empty, since a full disk could not give the next
        start new ones: the last to close deletes them, and one that can only read cannot.
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
            for chore in self._chores:
                if time.monotonic() >= chore.due_s:
                    chore.work(self._execute)
                    chore.due_s = time.monotonic() + chore.every_s
                    self._erasing |= chore.erases
            if self._erasing:  # what was deleted is also to leave the write-ahead log; a reader can delay that
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
                logger.error("The books refuse a change: %s.", type(error).__name__)
            self._changes.popleft()
            if written.set_running_or_notify_cancel():
                written.set_result(None) if failure is None else written.set_exception(failure)

    def _write_rows(self, buffer: WriteBuffer) -> None:
        """One batch. A row that the database refuses for what it holds is dropped, and counted."""
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
            logger.error("The books refuse a row: %s.", type(error).__name__)
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
    # FULL: what was answered survives a loss of power. secure_delete: what is deleted is overwritten.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > VERSION:
        connection.close()
        raise sqlite3.DatabaseError(f"it has version {version}, made by a newer Powerband")
    if version != VERSION:  # else nothing is written, so that a full disk is no reason not to start
        changes = [CHANGES[older] for older in range(version or VERSION, VERSION)]
        connection.executescript("".join(("BEGIN IMMEDIATE;", *changes, SCHEMA, "COMMIT;")))
    return connection


def _lock(path: Path) -> int:
    """Keeps a second gateway away: two would not see each other's reservations."""
    try:
        make_private_folder(path.parent)
        file = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise EnvironmentFault(f"The gateway's books {path} cannot be opened: {error}.") from error
    give_up_at = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError:
            if time.monotonic() > give_up_at:
                os.close(file)
                hint = "One gateway at a time: stop the other one, or give this one another file."
                raise EnvironmentFault(f"The gateway's books {path} are in use.", hint=hint) from None
            time.sleep(0.05)
