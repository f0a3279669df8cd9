"""Prompts and outputs, stored only with the setting store_content. They are redacted before they reach the disk, unless
redact_content is off, and deleted after content_retention_days or by DELETE /admin/content."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from powerband.gateway.accounts.redaction import redact
from powerband.gateway.accounts.store import Row, Run, Store
from powerband.gateway.request import GatewayRequest
from powerband.openai.fields import MessageFields

MAX_CHARS = 32_768  # of a prompt, and of an output
_MAX_WAITING = 256
_CUT = " …[cut]"
_INSERT = "INSERT OR IGNORE INTO content (request_id, at, key_id, prompt, output) VALUES (?, ?, ?, ?, ?)"
_FIELDS = ("request_id", "at", "key_id", "prompt", "output")


_PROMPT = msgspec.json.Decoder(str | list[str | MessageFields])


class TranscriptStore:
    """on: whether anything is stored."""

    def __init__(self, store: Store, on: bool, retention_days: float, *, redacts: bool = True) -> None:
        self.on = on
        self._store = store
        self._retention_s = retention_days * 86400
        self.buffer = store.buffer(_INSERT, _MAX_WAITING, prepare=_redacted if redacts else None)
        store.add_periodic(self._delete_old, every_s=600, erases=True)  # also if it was switched off since

    def note(self, request: GatewayRequest, prompt: bytes, output: Sequence[str]) -> None:
        """Store it, if this is on. prompt: 'messages' or 'prompt' as JSON. output: pieces of text.

        Redacted in the writer's thread; dropped and counted when the buffer is full.
        """
        if self.on:
            texts = _bounded(prompt_text(prompt)), _bounded("".join(output))
            self.buffer.add((request.id, time.time(), request.tenant, *texts))

    def forget(self, key_id: str) -> None:
        """Delete what is stored of a key; buffered rows are written first, and so deleted, too."""
        self._store.write("DELETE FROM content WHERE key_id = ?", (key_id,))

    def _delete_old(self, run: Run) -> None:
        run("DELETE FROM content WHERE at < ?", [(time.time() - self._retention_s,)])


def stored(connection: sqlite3.Connection, key_id: str, limit: int) -> list[dict[str, Any]]:
    """The latest first."""
    sql = "SELECT request_id, at, key_id, prompt, output FROM content WHERE key_id = ? ORDER BY at DESC LIMIT ?"
    return [dict(zip(_FIELDS, row, strict=True)) for row in connection.execute(sql, (key_id, limit))]


def prompt_text(prompt: bytes) -> str:
    """A readable prompt: 'role: content' of each message; token ids are left out."""
    try:
        found = _PROMPT.decode(prompt)
    except msgspec.ValidationError:  # token ids, or invalid
        return ""
    lines: list[str] = []
    for one in [found] if isinstance(found, str) else found:
        if isinstance(one, str):
            lines.append(one)
        elif isinstance(one.content, str):
            lines.append(f"{one.role}: {one.content}")
        else:
            lines.extend(one.texts)
    return "\n".join(lines)


def _bounded(text: str) -> str:
    """Cut before the last words: half an address or half a number would not be recognized and redacted."""
    return text if len(text) <= MAX_CHARS else text[:MAX_CHARS].rsplit(None, 12)[0] + _CUT


def _redacted(row: Row) -> Row:
    *known, prompt, output = row
    return (*known, redact(prompt), redact(output))
