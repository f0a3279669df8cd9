"""A server that plays an OpenAI-compatible one by a script, and knows what it did: the load generator's measure.

    python -m powerband.bench.scripted_server --port 0 --script '{"ttft_s": 0.1, "tpot_s": 0.01}'

Its address is the first line of its output; it listens on loopback only. `GET /truth` tells what became of each request
(a list of script.Truth), `DELETE /truth` forgets it and begins anew. It generates nothing: output is common words.
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

from powerband.bench.messages import Endpoint
from powerband.bench.precise_timer import PreciseTimer
from powerband.bench.script import Script, Speaker, Truth, read_body, text_of
from powerband.bench.scripted_stream import ScriptedStream
from powerband.errors import InvalidRequest, PowerbandError

HOST = "127.0.0.1"
MAX_HEAD_BYTES = 64 << 10
_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 413: "Content Too Large"}
_REASONS |= {429: "Too Many Requests", 431: "Request Header Fields Too Large", 500: "Internal Server Error"}
_REASONS |= {502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout"}
_ENDPOINTS: dict[str, Endpoint] = {"/v1/completions": "completions", "/v1/chat/completions": "chat"}


class ScriptedServer:
    """Within the running event loop, from `start` to `close`. A stall blocks that loop: see `scripted_process`."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.deadlines = PreciseTimer()
        self._listening: asyncio.Server | None = None
        self._connections: set[Connection] = set()
        self.forget()

    async def start(self, port: int = 0) -> str:
        """The address: 'http://127.0.0.1:port'. Raises OSError when the port is taken."""
        make = partial(Connection, self, self._connections)
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
        self.truths: list[Truth] = []
        self._active: set[ScriptedStream] = set()
        self._waiting: deque[ScriptedStream] = deque()
        self._taken = 0  # slots
        self._is_stall_due = self.script.stall_s > 0

    def arrive(self, connection: Connection, path: str, data: bytes) -> ScriptedStream | None:
        """A request to generate. None: it is answered already."""
        script, now_s = self.script, time.monotonic()
        truth = Truth(number=len(self.truths), digest=body_digest(data), arrived_s=now_s)
        self.truths.append(truth)
        if self._is_stall_due:
            self._is_stall_due = False
            self.deadlines.at(now_s + script.stall_at_s, partial(self._stall, self.truths))
        endpoint = _ENDPOINTS[path]
        try:
            body = read_body(data, endpoint, script)
        except InvalidRequest as problem:
            connection.refuse(400, str(problem), truth, code=problem.code)
            return None
        if script.fail_every and (truth.number + 1) % script.fail_every == 0:
            connection.refuse(script.fail_status, "Scripted to fail.", truth)
            return None
        if script.most_in_flight and len(self._active) >= script.most_in_flight:
            connection.refuse(429, "Scripted to refuse.", truth, f"Retry-After: {script.retry_after_s:g}\r\n")
            return None
        speaker = Speaker(truth.number, body, endpoint, script.usage)
        stream = ScriptedStream(self, connection, truth, body, speaker)
        self._active.add(stream)
        if script.slots and self._taken >= script.slots:
            self._waiting.append(stream)
        else:
            self._begin(stream)
        return stream

    def leave(self, stream: ScriptedStream) -> None:
        """It is answered, or its client is gone."""
        if stream not in self._active:
            return
        self._active.discard(stream)
        if stream.truth.begun_s is None:
            self._waiting.remove(stream)
            return
        if stream.truth.is_cancelled and self.script.leaks_slots:
            return
        self._taken -= 1
        if self._waiting:
            self._begin(self._waiting.popleft())

    def _begin(self, stream: ScriptedStream) -> None:
        self._taken += 1
        stream.begin(time.monotonic() if self.script.slots else stream.truth.arrived_s)

    def _stall(self, truths: list[Truth]) -> None:
        if truths is self.truths:  # else it was told to forget
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
        begun = [truth for truth in self.truths if truth.begun_s is not None]
        first = [truth.written_s[0] - truth.arrived_s for truth in begun if truth.written_s]
        queued = [(truth.begun_s or 0.0) - truth.arrived_s for truth in begun]
        values = {
            "num_requests_running": len(self._active) - len(self._waiting),
            "num_requests_waiting": len(self._waiting),
            "generation_tokens_total": sum(truth.tokens for truth in self.truths),
            "time_to_first_token_seconds_count": len(first),
            "time_to_first_token_seconds_sum": sum(first),
            "request_queue_time_seconds_count": len(queued),
            "request_queue_time_seconds_sum": sum(queued),
        }
        return "".join(f'vllm:{name}{{model_name="{self.script.model}"}} {value}\n' for name, value in values.items())


class Connection(asyncio.Protocol):
    def __init__(self, server: ScriptedServer, connections: set[Connection]) -> None:
        self._server, self._connections = server, connections
        self.stream: ScriptedStream | None = None
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
            self.refuse(400, f"This is no HTTP: {problem}", None)
        if self._unread_bytes is not None and self._unread_bytes > MAX_HEAD_BYTES:
            self.refuse(431, "The head is too long.", None)

    def connection_lost(self, _problem: Exception | None) -> None:
        self._connections.discard(self)
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.truth.is_cancelled, stream.truth.ended_s = True, time.monotonic()
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
            self.answer(200, msgspec.json.encode({"prompt": text_of(msgspec.json.decode(data).get("tokens", []))}))
        elif path in _ENDPOINTS:
            if method != b"POST":
                self.answer(405, _error("Post it."))
                return
            stream = self._server.arrive(self, path, data)
            # What is answered at once has left already.
            self.stream = stream if stream is not None and stream.truth.ended_s is None else None
        else:
            self._answer_page(method, path)

    # Called by streams.

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def answer(self, status: int, body: bytes, headers: str = "", content_type: str = "application/json") -> None:
        head = f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {content_type}\r\n{headers}"
        self._transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    def refuse(
        self, status: int, message: str, truth: Truth | None, headers: str = "", code: str | None = None
    ) -> None:
        """An error object; without a truth the connection ends with it."""
        if self._transport.is_closing():
            return
        self.answer(status, _error(message, code), headers if truth is not None else f"{headers}Connection: close\r\n")
        if truth is None:
            self._transport.close()
        else:
            truth.status, truth.ended_s = status, time.monotonic()

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
            case b"GET", "/truth":
                self.answer(200, msgspec.json.encode(self._server.truths))
            case b"DELETE", "/truth":
                self._server.forget()
                self.answer(200, b"{}")
            case _:
                self.answer(404, _error(f"There is no {path}."))


def body_digest(body: bytes) -> str:
    return hashlib.blake2b(body, digest_size=16).hexdigest()


def _error(message: str, code: str | None = None) -> bytes:
    return msgspec.json.encode({"error": {"message": message, "type": "scripted", "param": None, "code": code}})


async def _serve(script: Script, port: int, with_parent: bool) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    server = ScriptedServer(script)
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
    parser.add_argument("--script", default="{}", help="the fields of script.Script, as JSON")
    parser.add_argument("--with-parent", action="store_true", help="end when stdin does")
    options = parser.parse_args()
    import uvloop

    try:
        uvloop.run(_serve(Script.from_json(options.script), options.port, options.with_parent))
    except (PowerbandError, OSError) as problem:
        sys.stderr.write(f"{problem}\n")
        return problem.exit_code if isinstance(problem, PowerbandError) else 3
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
