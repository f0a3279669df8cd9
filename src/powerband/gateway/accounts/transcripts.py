"""Prompts and outputs, kept only where the setting store_content asks for it: redacted before they reach the disk,
deleted when their time is over, and at once for a key."""

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

MOST_CHARS = 32_768  # of a prompt, and of an output
_MOST_WAITING = 256
_CUT = " …[cut]"
_INSERT = "INSERT OR IGNORE INTO content (request_id, at, key_id, prompt, output) VALUES (?, ?, ?, ?, ?)"
_FIELDS = ("request_id", "at", "key_id", "prompt", "output")


_PROMPT = msgspec.json.Decoder(str | list[str | MessageFields])


class TranscriptStore:
    """on: whether anything is kept at all."""

    def __init__(self, store: Store, on: bool, retention_days: float) -> None:
        self.on = on
        self._store = store
        self._retention_s = retention_days * 86400
        self.buffer = store.buffer(_INSERT, _MOST_WAITING, prepare=_redacted)
        store.also(self._delete_old, every_s=600, erases=True)  # also where it was on before, and is off now

    def note(self, request: GatewayRequest, prompt: bytes, output: Sequence[str]) -> None:
        """Nothing happens when it is off. prompt: 'messages' or 'prompt' as JSON. output: pieces of text.

        Redacted in the writer's thread; dropped, and counted, when too much waits.
        """
        if self.on:
            texts = _bounded(prompt_text(prompt)), _bounded("".join(output))
            self.buffer.add((request.id, time.time(), request.tenant, *texts))

    def forget(self, key_id: str) -> None:
        """Delete what was kept of a key; what waits to be written is written first, so it goes as well."""
        self._store.write("DELETE FROM content WHERE key_id = ?", (key_id,))

    def _delete_old(self, run: Run) -> None:
        run("DELETE FROM content WHERE at < ?", [(time.time() - self._retention_s,)])


def stored(connection: sqlite3.Connection, key_id: str, limit: int) -> list[dict[str, Any]]:
    """The latest first."""
    sql = "SELECT request_id, at, key_id, prompt, output FROM content WHERE key_id = ? ORDER BY at DESC LIMIT ?"
    return [dict(zip(_FIELDS, row, strict=True)) for row in connection.execute(sql, (key_id, limit))]


def prompt_text(prompt: bytes) -> str:
    """A prompt for reading: 'role: content' of each message, and the texts inside; token ids are left out."""
    try:
        found = _PROMPT.decode(prompt)
    except msgspec.ValidationError:  # token ids, or nothing that a replica would take
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
    """Cut before the last words: half an address or half a number would not be recognised as one."""
    return text if len(text) <= MOST_CHARS else text[:MOST_CHARS].rsplit(None, 12)[0] + _CUT


def _redacted(row: Row) -> Row:
    *known, prompt, output = row
    return (*known, redact(prompt), redact(output))
