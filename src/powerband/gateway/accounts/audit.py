"""The audit log: what administrators did. Each entry's hash covers the entry before it, so that a change is detected.

A file beside the database holds the number and hash of the last entry, so that a missing end is detected, too. An
attacker who can write both files could make a new chain; therefore every entry's hash is also logged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from powerband.files import write_atomically
from powerband.gateway.accounts.store import Run, Store

logger = logging.getLogger(__name__)

FIRST_HASH = "0" * 64
_INSERT = "INSERT INTO audit (seq, at, actor, action, what, hash) VALUES (?, ?, ?, ?, ?, ?)"
_SELECT = "SELECT seq, at, actor, action, what, hash FROM audit WHERE seq > ? ORDER BY seq LIMIT ?"
_MAX_CHARS = 200  # characters of actor and action


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One row."""

    seq: int  # from 1, without gaps
    at: float  # seconds since 1970
    actor: str
    action: str
    what: str  # JSON
    hash: str  # of this entry and the one before it


class ChainHead(msgspec.Struct, frozen=True):
    """The last entry, as the file beside the database holds it."""

    seq: int = 0
    hash: str = FIRST_HASH


class Audit:
    """Append-only. head: the last entry that is known to be on disk."""

    def __init__(self, store: Store, wall: Callable[[], float] = time.time) -> None:
        self._store = store
        self._wall = wall
        self._path = head_path(store.path)
        self._last = store.read(_last)
        kept = read_head(self._path)
        if kept is not None and kept.seq > self._last.seq:
            logger.error("The audit log ends at entry %d, but had %d: it was cut off.", self._last.seq, kept.seq)
            self._last = kept  # the gap stays in the chain
        self._written = self.head = kept or self._last
        store.add_periodic(self._keep_head)
        if kept is None and self._last.seq:
            self.note("powerband", "audit.head", {"file": "missing", "entries": self._last.seq})

    def note(self, actor: str, action: str, what: Mapping[str, Any]) -> None:
        """what: plain values, no secrets. Raises StoreUnavailable."""
        seq, at, details = self._last.seq + 1, self._wall(), json.dumps(what, sort_keys=True, default=str)
        actor, action = actor[:_MAX_CHARS], action[:_MAX_CHARS]
        hash = _hash(self._last.hash, seq, at, actor, action, details)
        last = self._last = ChainHead(seq, hash)
        written = self._store.write(_INSERT, (seq, at, actor, action, details, hash))
        written.add_done_callback(lambda done: self._note_written(last, done))
        logger.info("audit %d: %s by %s", seq, action, actor, extra={"audit_seq": seq, "audit_hash": hash})

    def _note_written(self, last: ChainHead, done: Future[None]) -> None:
        """In the writer's thread."""
        if not done.cancelled() and done.exception() is None:
            self._written = last

    def _keep_head(self, _run: Run) -> None:
        """In the writer's thread, after the entries. If it cannot be written, neither could they."""
        written = self._written
        if written.seq > self.head.seq or (written.seq and not self._path.exists()):
            with contextlib.suppress(OSError):
                write_atomically(self._path, msgspec.json.encode(written), private=True)
                self.head = written


def head_path(accounts: Path) -> Path:
    return accounts.with_name(f"{accounts.name}.audit")


def read_head(path: Path) -> ChainHead | None:
    """None: it is not there, or damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=ChainHead)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def entries(connection: sqlite3.Connection, after: int = 0, limit: int = -1) -> list[AuditEntry]:
    """Oldest first, from those after number `after`; limit -1: all."""
    return [AuditEntry(*row) for row in connection.execute(_SELECT, (after, limit))]


def verify_chain(found: Iterable[AuditEntry], head: ChainHead | None = None) -> int | None:
    """The number at which the chain from entry 1 on does not hold, or ends before its head; None when it is whole."""
    before, seq = FIRST_HASH, 0
    for seq, entry in enumerate(found, 1):
        try:
            before = _hash(before, seq, entry.at, entry.actor, entry.action, entry.what)
        except TypeError:  # a value of another kind than any that was written
            return seq
        if (entry.seq, entry.hash) != (seq, before) or (head is not None and seq == head.seq and before != head.hash):
            return seq
    return seq + 1 if head is not None and seq < head.seq else None


def _last(connection: sqlite3.Connection) -> ChainHead:
    row = connection.execute("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1").fetchone()
    return ChainHead(row[0], row[1]) if row else ChainHead()


def _hash(before: str, seq: int, at: float, actor: str, action: str, what: str) -> str:
    return hashlib.sha256(json.dumps([before, seq, at, actor, action, what]).encode()).hexdigest()
