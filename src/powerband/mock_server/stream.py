"""One answer of a scripted server: its chunks at their times, and its breaking off as the script says."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from powerband.mock_server.behavior import (
    END,
    GARBAGE,
    TROUBLE,
    DropBy,
    MockRequest,
    ReplyWriter,
    ServerRecord,
    chunk_frame,
)

if TYPE_CHECKING:
    from powerband.mock_server.server import MockConnection, MockServer

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class MockStream:
    """One answer. Streamed, its chunks go out at their times; else it goes out with its last token."""

    __slots__ = ("_body", "_chunks", "_connection", "_is_held", "_server", "_writer", "begun_s", "record")

    def __init__(
        self,
        server: MockServer,
        connection: MockConnection,
        record: ServerRecord,
        body: MockRequest,
        writer: ReplyWriter,
    ) -> None:
        self._server, self._connection, self.record = server, connection, record
        self._body, self._writer = body, writer
        self._chunks, self._is_held, self.begun_s = 0, False, 0.0

    def begin(self, now_s: float) -> None:
        self.begun_s = self.record.begun_s = now_s
        script, total = self._server.script, self._body.output_tokens
        if self._drops and (not script.drop_after_chunks or (script.drop_whole and not self._body.stream)):
            return self._break(script.drop_by)
        if not self._body.stream:
            return self._server.deadlines.at(now_s + script.due_s(script.chunks(total) - 1), self._answer_whole)
        self.record.status = 200
        self._connection.write(_HEAD + self._writer.opening())
        if script.is_instant and not script.drop_every:
            size, first = script.tokens_per_chunk, self._body.first_index
            pieces = [self._writer.chunk(i, min(i + size, total)) for i in range(first, total, size)]
            self.record.written_s, self.record.tokens = [time.monotonic()] * len(pieces), total - first
            self._connection.write(b"".join(pieces))
            return self._end()
        return self._server.deadlines.at(now_s + script.ttft_s, self.advance)

    def advance(self) -> None:
        """Send the next chunk, and ask for the one after it."""
        record, script, connection = self.record, self._server.script, self._connection
        if connection.stream is not self:
            return
        if connection.is_paused:
            self._is_held = True  # its client does not read
            return
        first = self._body.first_index + record.tokens
        after = min(first + script.tokens_per_chunk, self._body.output_tokens)
        connection.write(self._writer.chunk(first, after))
        record.tokens += after - first
        record.written_s.append(time.monotonic())
        self._chunks += 1
        if self._drops and self._chunks == script.drop_after_chunks and script.drop_by != "no_done":
            self._break(script.drop_by)
        elif after == self._body.output_tokens:
            self._end()
        else:
            self._server.deadlines.at(self.begun_s + script.due_s(self._chunks), self.advance)

    @property
    def _drops(self) -> bool:
        script = self._server.script
        return bool(script.drop_every) and (self.record.number + 1) % script.drop_every == 0

    def _break(self, how: DropBy) -> None:
        connection, has_head = self._connection, self.record.status == 200
        if how == "reset" or (how == "end" and not has_head):
            connection.drop()
        elif how in ("garbage", "error"):
            message = GARBAGE if how == "garbage" else TROUBLE
            connection.write(chunk_frame(message) + END if has_head else message)
            self._leave()
        elif how == "end":
            connection.write(END)
            self._leave()

    def release(self) -> None:
        """Its client reads again."""
        if self._is_held:
            self._is_held = False
            self.advance()

    def _answer_whole(self) -> None:
        if self._connection.stream is self:
            self.record.status, self.record.tokens = 200, self._body.output_tokens
            self._connection.answer(200, self._writer.whole())
            self._leave()

    def _end(self) -> None:
        is_done = not (self._drops and self._server.script.drop_by == "no_done")
        self._connection.write(self._writer.closing(is_done=is_done))
        self._leave()

    def _leave(self) -> None:
        self.record.ended_s = time.monotonic()
        self._connection.stream = None
        self._server.leave(self)
