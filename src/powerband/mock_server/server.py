"""An OpenAI-compatible server with a given behavior, which records what it did.

    python -m powerband.mock_server.server --port 0 --script '{"ttft_s": 0.1, "tpot_s": 0.01}'

Its address is the first line of its output; it listens on loopback only. `GET /records` lists each request and its
outcome (ServerRecord), `DELETE /records` clears the list. It has no model: output is common words.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import hashlib
import signal
import sys
import time
from collections import deque
from functools import partial
from typing import cast

import httptools
import msgspec

from powerband.bench.client.messages import Endpoint
from powerband.bench.client.precise_timer import PreciseTimer
from powerband.errors import InvalidRequest, PowerbandError
from powerband.mock_server.behavior import (
    GARBAGE,
    LAST_CHUNK,
    TROUBLE,
    Behavior,
    DropBy,
    MockRequest,
    ReplyWriter,
    ServerRecord,
    chunk_frame,
    read_body,
    text_from_ids,
)
from powerband.openai.errors import ErrorBody, ErrorObject

HOST = "127.0.0.1"
MAX_HEAD_BYTES = 64 << 10
_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 413: "Content Too Large"}
_REASONS |= {429: "Too Many Requests", 431: "Request Header Fields Too Large", 500: "Internal Server Error"}
_REASONS |= {502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout"}
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_ENDPOINTS: dict[str, Endpoint] = {"/v1/completions": "completions", "/v1/chat/completions": "chat"}


class MockServer:
    """Within the running event loop, from `start` to `close`. A stall blocks that loop: see `scripted_process`."""

    def __init__(self, script: Behavior) -> None:
        self.script = script
        self.deadlines = PreciseTimer()
        self._listening: asyncio.Server | None = None
        self._connections: set[MockConnection] = set()
        self.forget()

    async def start(self, port: int = 0) -> str:
        """The address: 'http://127.0.0.1:port'. Raises OSError when the port is taken."""
        make = partial(MockConnection, self, self._connections)
        self._listening = await asyncio.get_running_loop().create_server(make, HOST, port, backlog=4096)
        return f"http://{HOST}:{self._listening.sockets[0].getsockname()[1]}"

    def close(self) -> None:
        self.deadlines.close()
        if self._listening is not None:
            self._listening.close()
        for connection in tuple(self._connections):
            connection.drop()

    def forget(self) -> None:
        """What was, and let the next request be the first. What is being answered goes on, unrecorded."""
        self.records: list[ServerRecord] = []
        self._active: set[MockStream] = set()
        self._waiting: deque[MockStream] = deque()
        self._taken = 0  # slots
        self._is_stall_due = self.script.stall_s > 0

    def arrive(self, connection: MockConnection, path: str, data: bytes) -> MockStream | None:
        """A request to generate. None: it is answered already."""
        script, now_s = self.script, time.monotonic()
        record = ServerRecord(number=len(self.records), digest=body_digest(data), arrived_s=now_s)
        self.records.append(record)
        if self._is_stall_due:
            self._is_stall_due = False
            self.deadlines.at(now_s + script.stall_at_s, partial(self._stall, self.records))
        endpoint = _ENDPOINTS[path]
        try:
            body = read_body(data, endpoint, script)
        except InvalidRequest as problem:
            connection.refuse(400, str(problem), record, code=problem.code)
            return None
        if script.fail_every and (record.number + 1) % script.fail_every == 0:
            connection.refuse(script.fail_status, "Scripted to fail.", record)
            return None
        if script.max_in_flight and len(self._active) >= script.max_in_flight:
            connection.refuse(429, "Scripted to refuse.", record, f"Retry-After: {script.retry_after_s:g}\r\n")
            return None
        writer = ReplyWriter(record.number, body, endpoint, script.usage)
        stream = MockStream(self, connection, record, body, writer)
        self._active.add(stream)
        if script.slots and self._taken >= script.slots:
            self._waiting.append(stream)
        else:
            self._begin(stream)
        return stream

    def leave(self, stream: MockStream) -> None:
        """It is answered, or its client is gone."""
        if stream not in self._active:
            return
        self._active.discard(stream)
        if stream.record.begun_s is None:
            self._waiting.remove(stream)
            return
        if stream.record.is_cancelled and self.script.leaks_slots:
            return
        self._taken -= 1
        if self._waiting:
            self._begin(self._waiting.popleft())

    def _begin(self, stream: MockStream) -> None:
        self._taken += 1
        stream.begin(time.monotonic() if self.script.slots else stream.record.arrived_s)

    def _stall(self, records: list[ServerRecord]) -> None:
        if records is self.records:  # else it was told to forget
            # What was written a moment ago is on its way first.
            asyncio.get_running_loop().call_later(0.002, self._stand_still)

    def _stand_still(self) -> None:
        started_s = time.monotonic()
        time.sleep(self.script.stall_s)
        lost_s = time.monotonic() - started_s
        self.deadlines.postpone(lost_s)
        for stream in self._active:
            stream.begun_s += lost_s

    def metrics(self) -> str:
        """Under vLLM's names."""
        begun = [record for record in self.records if record.begun_s is not None]
        first = [record.written_s[0] - record.arrived_s for record in begun if record.written_s]
        queued = [(record.begun_s or 0.0) - record.arrived_s for record in begun]
        values = {
            "num_requests_running": len(self._active) - len(self._waiting),
            "num_requests_waiting": len(self._waiting),
            "generation_tokens_total": sum(record.tokens for record in self.records),
            "time_to_first_token_seconds_count": len(first),
            "time_to_first_token_seconds_sum": sum(first),
            "request_queue_time_seconds_count": len(queued),
            "request_queue_time_seconds_sum": sum(queued),
        }
        return "".join(f'vllm:{name}{{model_name="{self.script.model}"}} {value}\n' for name, value in values.items())


class MockConnection(asyncio.Protocol):
    def __init__(self, server: MockServer, connections: set[MockConnection]) -> None:
        self._server, self._connections = server, connections
        self.stream: MockStream | None = None
        self.is_paused = False
        self._parser = httptools.HttpRequestParser(self)
        self._path = ""
        self._head_bytes = 0  # of headers that are whole
        self._unread_bytes: int | None = 0  # since the message began; None: its head is read
        self._body: list[bytes] = []
        self._body_bytes = 0

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self._unread_bytes is not None:
            self._unread_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as problem:
            self.refuse(400, f"Invalid HTTP: {problem}", None)
        if self._unread_bytes is not None and self._unread_bytes > MAX_HEAD_BYTES:
            self.refuse(431, "The head is too long.", None)

    def connection_lost(self, _problem: Exception | None) -> None:
        self._connections.discard(self)
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.record.is_cancelled, stream.record.ended_s = True, time.monotonic()
            self._server.leave(stream)

    def pause_writing(self) -> None:
        self.is_paused = True

    def resume_writing(self) -> None:
        self.is_paused = False
        if self.stream is not None:
            self.stream.release()

    # Called by the parser.

    def on_message_begin(self) -> None:
        self._path, self._body, self._body_bytes, self._head_bytes = "", [], 0, 0

    def on_url(self, url: bytes) -> None:
        self._path += url.decode("latin-1")
        self._head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)

    def on_headers_complete(self) -> None:
        self._unread_bytes = None
        if self._head_bytes > MAX_HEAD_BYTES:
            self.refuse(431, "The head is too long.", None)

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes <= self._server.script.max_body_bytes:
            self._body.append(body)
        else:
            self._body.clear()
            self.refuse(413, "The body is too large.", None)

    def on_message_complete(self) -> None:
        self._unread_bytes = 0
        method, path, data = self._parser.get_method(), self._path.partition("?")[0], b"".join(self._body)
        if self._transport.is_closing():
            return
        if self.stream is not None:
            self.refuse(400, "One request at a time, please.", None)
        elif path == "/detokenize" and method == b"POST":
            self.answer(
                200, msgspec.json.encode({"prompt": text_from_ids(msgspec.json.decode(data).get("tokens", []))})
            )
        elif path in _ENDPOINTS:
            if method != b"POST":
                self.answer(405, _error("Post it."))
                return
            stream = self._server.arrive(self, path, data)
            # What is answered at once has left already.
            self.stream = stream if stream is not None and stream.record.ended_s is None else None
        else:
            self._answer_page(method, path)

    # Called by streams.

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def answer(self, status: int, body: bytes, headers: str = "", content_type: str = "application/json") -> None:
        head = f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {content_type}\r\n{headers}"
        self._transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    def refuse(
        self, status: int, message: str, record: ServerRecord | None, headers: str = "", code: str | None = None
    ) -> None:
        """An error object; without a truth the connection ends with it."""
        if self._transport.is_closing():
            return
        self.answer(status, _error(message, code), headers if record is not None else f"{headers}Connection: close\r\n")
        if record is None:
            self._transport.close()
        else:
            record.status, record.ended_s = status, time.monotonic()

    def drop(self) -> None:
        self._transport.abort()

    def _answer_page(self, method: bytes, path: str) -> None:
        script = self._server.script
        match method, path:
            case b"GET", "/v1/models":
                card = {"id": script.model, "object": "model", "owned_by": "powerband"}
                listed = {"object": "list", "data": [{**card, "max_model_len": script.max_model_len}]}
                self.answer(200, msgspec.json.encode(listed))
            case b"GET", "/metrics":
                self.answer(200, self._server.metrics().encode(), content_type="text/plain; version=0.0.4")
            case b"GET", "/version":
                self.answer(200, b'{"version":"1"}')
            case b"GET", "/health" | "/livez" | "/readyz":
                self.answer(200, b"{}")
            case b"GET", "/records":
                self.answer(200, msgspec.json.encode(self._server.records))
            case b"DELETE", "/records":
                self._server.forget()
                self.answer(200, b"{}")
            case _:
                self.answer(404, _error(f"There is no {path}."))


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
            connection.write(chunk_frame(message) + LAST_CHUNK if has_head else message)
            self._leave()
        elif how == "end":
            connection.write(LAST_CHUNK)
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


def body_digest(body: bytes) -> str:
    return hashlib.blake2b(body, digest_size=16).hexdigest()


def _error(message: str, code: str | None = None) -> bytes:
    return msgspec.json.encode(ErrorBody(ErrorObject(message=message, type="scripted", param=None, code=code)))


async def _serve(script: Behavior, port: int, with_parent: bool) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    server = MockServer(script)
    sys.stdout.write(f"{await server.start(port)}\n")
    sys.stdout.flush()
    gc.freeze()
    gc.set_threshold(200_000, 50, 100)  # as the worker: little is garbage, and a collection would be a stall
    if with_parent:
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        asyncio.ensure_future(reader.read()).add_done_callback(lambda _: ended.set())
    await ended.wait()
    server.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="An OpenAI-compatible server that follows a script.")
    parser.add_argument("--port", type=int, default=0, help="of loopback; 0: any that is free")
    parser.add_argument("--script", default="{}", help="the fields of mock_server.behavior.Behavior, as JSON")
    parser.add_argument("--with-parent", action="store_true", help="end when stdin does")
    options = parser.parse_args()
    import uvloop

    try:
        uvloop.run(_serve(Behavior.from_json(options.script), options.port, options.with_parent))
    except (PowerbandError, OSError) as problem:
        sys.stderr.write(f"{problem}\n")
        return problem.exit_code if isinstance(problem, PowerbandError) else 3
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
