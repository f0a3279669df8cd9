"""Clients' feedback on responses: a score from -1 (bad) to 1 (good), and a comment, which is redacted."""

from __future__ import annotations

import sqlite3
import time
from typing import Any

from powerband.errors import InvalidRequest
from powerband.gateway.accounts.redaction import redact
from powerband.gateway.accounts.store import Row, Run, Store, StoreUnavailable
from powerband.gateway.accounts.usage_log import UsageLog
from powerband.web.errors import HttpError

MAX_COMMENT_CHARS = 2000
_MAX_WAITING = 10_000
_INSERT = "INSERT OR REPLACE INTO feedback (request_id, at, key_id, score, comment) VALUES (?, ?, ?, ?, ?)"
_FIELDS = ("request_id", "at", "key_id", "score", "comment")


class Feedback:
    """One per request: a new one replaces the old one. Stored as long as usage rows."""

    def __init__(self, store: Store, usage_log: UsageLog, retention_days: float) -> None:
        self._store = store
        self._ledger = usage_log
        self._retention_s = retention_days * 86400
        self.buffer = store.buffer(_INSERT, _MAX_WAITING, prepare=_redacted)
        store.add_periodic(self._delete_old, every_s=600, erases=True)

    async def note(self, key_id: str, request_id: str, score: float, comment: str = "") -> None:
        """Raises InvalidRequest, HttpError 404 for a request that is not this key's, and StoreUnavailable."""
        if not -1 <= score <= 1:
            raise InvalidRequest(f"'score' is {score}; it must be between -1 (bad) and 1 (good).", param="score")
        if len(comment) > MAX_COMMENT_CHARS:
            raise InvalidRequest(f"'comment' is longer than {MAX_COMMENT_CHARS} characters.", param="comment")
        owner = self._ledger.key_of(request_id)
        if owner is None:
            owner = await self._store.query(lambda connection: _key_of(connection, request_id))
        if owner != key_id:
            hint = "Send the X-Request-Id of a response that this key received."
            raise HttpError(404, "request_not_found", "This key has no such request.", hint=hint)
        if not self.buffer.add((request_id, time.time(), key_id, score, comment)):
            raise StoreUnavailable("Too much feedback is waiting to be written.")

    def _delete_old(self, run: Run) -> None:
        run("DELETE FROM feedback WHERE at < ?", [(time.time() - self._retention_s,)])


def read_feedback(connection: sqlite3.Connection, since: float, limit: int) -> list[dict[str, Any]]:
    """The latest first."""
    sql = "SELECT request_id, at, key_id, score, comment FROM feedback WHERE at >= ? ORDER BY at DESC LIMIT ?"
    return [dict(zip(_FIELDS, row, strict=True)) for row in connection.execute(sql, (since, limit))]


def _key_of(connection: sqlite3.Connection, request_id: str) -> str | None:
    row = connection.execute("SELECT key_id FROM usage WHERE request_id = ?", (request_id,)).fetchone()
    return None if row is None else str(row[0])


def _redacted(row: Row) -> Row:
    *known, comment = row
    return (*known, redact(comment))
