"""Responses of OpenAI's Responses API, with their input, for `previous_response_id` and `GET /v1/responses/ID`.

They are stored only with the setting store_content, as long as other content, and only their key finds them. Each row
has the items of one request; a conversation is read by following `previous_id`. With redact_content, personal data is
redacted before it reaches the disk: such a row can be read, but a conversation over it would not be the client's any
more, so that it is refused.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from powerband.errors import InvalidRequest
from powerband.gateway.accounts.redaction import redact
from powerband.gateway.accounts.store import Row, Run, Store
from powerband.openai.chunks import INVALID_JSON
from powerband.web.errors import HttpError

_MAX_WAITING = 256
_MAX_WAITING_BYTES = 64 << 20
_READ_RATIO = 4  # of a conversation: responses have more than items, such as the tools
_INSERT = """
INSERT OR IGNORE INTO responses (id, at, key_id, request_id, previous_id, redacted, input, response)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)
"""
_SELECT = "SELECT previous_id, redacted, input, response FROM responses WHERE id = ? AND key_id = ?"
_DELETE_TEXTS = "DELETE FROM content WHERE request_id = (SELECT request_id FROM responses WHERE id = ? AND key_id = ?)"
# Made by servers: by chance their digits may look like the number of a card, and items refer to each other by them.
_ID = re.compile(r"[a-z]{2,12}_[0-9A-Za-z]{8,64}")
_ID_FIELDS = frozenset(("id", "call_id", "previous_response_id"))


class StoredResponse(NamedTuple):
    """input: the items of its request, without those of the conversation before it. Both are JSON."""

    input: bytes
    response: bytes


class _Output(msgspec.Struct):
    output: list[msgspec.Raw] = msgspec.field(default_factory=list)


class ResponseStore:
    """on: whether anything is stored."""

    def __init__(self, store: Store, on: bool, retention_days: float, *, redacts: bool = True) -> None:
        self.on = on
        self._store = store
        self._retention_s = retention_days * 86400
        prepare = _redacted if redacts else None
        self.buffer = store.buffer(_INSERT, _MAX_WAITING, prepare=prepare)
        store.add_periodic(self._delete_old, every_s=600, erases=True)

    def note(self, key_id: str, request_id: str, id: str, previous_id: str | None, stored: StoredResponse) -> None:
        """Store a response. Redacted in the writer's thread; dropped and counted when too many wait."""
        row = (id, time.time(), key_id, request_id, previous_id, 0, stored.input, stored.response)
        if _size((*self.buffer.rows, row)) > _MAX_WAITING_BYTES:
            self.buffer.drop(row)
        else:
            self.buffer.add(row)

    async def get(self, key_id: str, id: str) -> StoredResponse:
        """Raises HttpError 404, and StoreUnavailable."""
        found = await self._read(lambda connection: connection.execute(_SELECT, (id, key_id)).fetchall())
        if not found:
            raise HttpError(404, "response_not_found", f"There is no response {id[:80]!r}.", param="response_id")
        return StoredResponse(*found[0][2:])

    async def conversation(self, key_id: str, id: str, max_bytes: int) -> list[bytes]:
        """The items of a response and of those before it, in their order, as JSON. Raises InvalidRequest, and
        StoreUnavailable.
        """

        def read(connection: sqlite3.Connection) -> list[tuple[Any, ...]]:
            """From the latest to the first, or to the one that is not found, or to the size."""
            rows: list[tuple[Any, ...]] = []
            at: str | None = id
            left = _READ_RATIO * max_bytes
            while at is not None and left >= 0:
                found = connection.execute(_SELECT, (at, key_id)).fetchone()
                if found is None:
                    break
                rows.append(found)
                left -= _size([found])
                at = found[0]
            return rows

        rows = await self._read(read)
        if any(is_redacted for _, is_redacted, *_ in rows):
            raise _redacted_conversation(id)
        items = [item for row in reversed(rows) for item in _items(*row[2:])]
        if sum(map(len, items)) > max_bytes or _size(rows) > _READ_RATIO * max_bytes:
            raise too_large(id, max_bytes)
        missing = rows[-1][0] if rows else id
        if missing is not None:
            raise _not_found(id, missing)
        return items

    async def _read(self, function: Callable[[sqlite3.Connection], list[tuple[Any, ...]]]) -> list[tuple[Any, ...]]:
        return await self._store.query(function) or await self._store.read_latest(function)  # it may wait to be written

    async def delete(self, key_id: str, id: str) -> None:
        """Also what is stored of its request as content. Raises HttpError 404, and StoreUnavailable."""
        await self.get(key_id, id)
        self._store.write(_DELETE_TEXTS, (id, key_id))
        self._store.write("DELETE FROM responses WHERE id = ? AND key_id = ?", (id, key_id))
        await self._store.saved()

    def forget(self, key_id: str) -> None:
        """Delete what is stored of a key; buffered rows are written first, and so deleted, too."""
        self._store.write("DELETE FROM responses WHERE key_id = ?", (key_id,))

    def _delete_old(self, run: Run) -> None:
        run("DELETE FROM responses WHERE at < ?", [(time.time() - self._retention_s,)])


def _size(rows: Sequence[Row]) -> int:
    return sum(len(row[-2]) + len(row[-1]) for row in rows)


def _items(sent: bytes, response: bytes) -> list[bytes]:
    items = msgspec.json.decode(sent, type=list[msgspec.Raw])
    return [bytes(item) for item in (*items, *msgspec.json.decode(response, type=_Output).output)]


def too_large(id: str, max_bytes: int) -> InvalidRequest:
    return InvalidRequest(
        f"The conversation of {id[:80]!r} is larger than {max_bytes} bytes.",
        hint="Begin another one, with a summary.",
        param="previous_response_id",
    )


def _not_found(id: str, missing: str) -> InvalidRequest:
    shown = (
        "" if missing == id else f" It continues {missing[:80]!r}, which was deleted or is older than the retention."
    )
    return InvalidRequest(
        f"There is no response {id[:80]!r} of this key to continue.{shown}",
        hint="Send the whole conversation in 'input'.",
        param="previous_response_id",
        code="previous_response_not_found",
    )


def _redacted_conversation(id: str) -> InvalidRequest:
    return InvalidRequest(
        f"The conversation of {id[:80]!r} cannot be continued: personal data was redacted when it was stored.",
        hint="Send the whole conversation in 'input'. (With --no-redact-content, a gateway stores texts as they are.)",
        param="previous_response_id",
        code="previous_response_redacted",
    )


def _redacted(row: Row) -> Row:
    *known, _, sent, response = row
    plain = msgspec.json.decode(sent), msgspec.json.decode(response)
    redacted = tuple(_redacted_value(value) for value in plain)
    # What the conversation consists of decides; other fields of the response are only shown.
    is_changed = plain[0] != redacted[0] or plain[1].get("output") != redacted[1].get("output")
    if is_changed:
        redacted = tuple(_without_logprobs(value) for value in redacted)  # they have the same text again
    return (*known, int(is_changed), *map(msgspec.json.encode, redacted))


def _redacted_value(value: Any) -> Any:
    if isinstance(value, str):
        return _redacted_text(value)
    if isinstance(value, list):
        return [_redacted_value(one) for one in value]
    if isinstance(value, dict):
        return {_redacted_text(name): one if _is_id(name, one) else _redacted_value(one) for name, one in value.items()}
    return value


def _is_id(name: str, value: Any) -> bool:
    return name in _ID_FIELDS and isinstance(value, str) and _ID.fullmatch(value) is not None


def _redacted_text(text: str) -> str:
    """Also within a text that is JSON, such as arguments, whose escapes would hide what is in it."""
    if text[:1] in ("{", "[") and "\\" in text:
        try:
            value = msgspec.json.decode(text)
        except INVALID_JSON:
            return redact(text)
        if (redacted := _redacted_value(value)) != value:
            text = msgspec.json.encode(redacted).decode()
    return redact(text)


def _without_logprobs(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_logprobs(one) for one in value]
    if isinstance(value, dict):
        return {name: [] if name == "logprobs" else _without_logprobs(one) for name, one in value.items()}
    return value


def listed(items: Sequence[Any], response_id: str) -> list[dict[str, Any]]:
    """Input items as OpenAI lists them: with ids and types, and their texts as parts."""
    found = []
    for number, item in enumerate(items):
        item = dict(item) if isinstance(item, dict) else {}
        item.setdefault("type", "message")
        item["id"] = item.get("id") or f"item_{response_id.removeprefix('resp_')}_{number}"
        if item["type"] == "message" and isinstance(text := item.get("content"), str):
            kind = "output_text" if item.get("role") == "assistant" else "input_text"
            more: dict[str, Any] = {"annotations": []} if kind == "output_text" else {}
            item["content"] = [{"type": kind, "text": text, **more}]
        found.append(item)
    return found
