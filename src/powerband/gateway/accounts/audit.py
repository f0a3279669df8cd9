"""What administrators did, in a chain: each entry's hash covers the one before it, so that a change shows.

Whoever can write the file could make a whole new chain; the log therefore gets every entry's hash as well.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from powerband.gateway.accounts.store import Store

logger = logging.getLogger(__name__)

FIRST_HASH = "0" * 64
_INSERT = "INSERT INTO audit (seq, at, actor, action, what, hash) VALUES (?, ?, ?, ?, ?, ?)"
_SELECT = "SELECT seq, at, actor, action, what, hash FROM audit WHERE seq > ? ORDER BY seq LIMIT ?"
_LONGEST = 200  # characters of actor and action


@dataclass(frozen=True, slots=True)
class Entry:
    """seq: from 1, without gaps. at: seconds since 1970. what: JSON. hash: of the entry before it, and of the rest."""

    seq: int
    at: float
    actor: str
    action: str
    what: str
    hash: str


class Audit:
    """Appends; nothing changes or deletes entries."""

    def __init__(self, store: Store, wall: Callable[[], float] = time.time) -> None:
        self._store = store
        self._wall = wall
        self._last = store.read(_last)

    def note(self, actor: str, action: str, what: Mapping[str, Any]) -> None:
        """what: plain values, no secrets. Raises StoreUnavailable."""
        seq, at, told = self._last[0] + 1, self._wall(), json.dumps(what, sort_keys=True, default=str)
        actor, action = actor[:_LONGEST], action[:_LONGEST]
        hash = _hash(self._last[1], seq, at, actor, action, told)
        self._store.write(_INSERT, (seq, at, actor, action, told, hash))
        self._last = seq, hash
        logger.info("audit %d: %s by %s", seq, action, actor, extra={"audit_seq": seq, "audit_hash": hash})


def entries(connection: sqlite3.Connection, after: int = 0, limit: int = -1) -> list[Entry]:
    """Oldest first, from those after number `after`; limit -1: all."""
    return [Entry(*row) for row in connection.execute(_SELECT, (after, limit))]


def first_broken(found: Iterable[Entry]) -> int | None:
    """The number at which the chain from entry 1 on does not hold; None when it does."""
    before = FIRST_HASH
    for seq, entry in enumerate(found, 1):
        before = _hash(before, seq, entry.at, entry.actor, entry.action, entry.what)
        if (entry.seq, entry.hash) != (seq, before):
            return seq
    return None


def _last(connection: sqlite3.Connection) -> tuple[int, str]:
    row = connection.execute("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1").fetchone()
    return (row[0], row[1]) if row else (0, FIRST_HASH)


def _hash(before: str, seq: int, at: float, actor: str, action: str, what: str) -> str:
    return hashlib.sha256(json.dumps([before, seq, at, actor, action, what]).encode()).hexdigest()
