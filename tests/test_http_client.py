"""The client for control traffic against servers that behave well and badly, one raw response each."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from powerband.http_client.request import Response, bearer, request, request_sync, split_url

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def respond(*parts: bytes, pause_s: float = 0.0) -> Serve:
    """A server that sends these bytes, whatever it is asked, and closes the connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause_s)
        writer.close()

    return serve


def exchange(serve: Serve, **options: Any) -> Response:
    async def run() -> Response:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            return await request("GET", f"http://127.0.0.1:{port}/", **options)
        finally:
            server.close()

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("raw", "status", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", 200, b"hi"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", 200, b"hi"),
        (b"HTTP/1.0 200 OK\r\n\r\nhi", 200, b"hi"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 Down\r\nContent-Length: 2\r\n\r\nno", 503, b"no"),
        (b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n", 302, b""),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi and more", 200, b"hi"),
    ],
)
def test_whole_responses_of_every_framing(raw: bytes, status: int, body: bytes) -> None:
    for parts in ((raw,), [raw[i : i + 1] for i in range(len(raw))]):
        assert exchange(respond(*parts)) == Response(status, body)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhi",
        b"HTTP/1.1 100 Continue\r\n\r\n",
    ],
)
def test_a_broken_response_is_a_connection_error(raw: bytes) -> None:
    with pytest.raises(ConnectionError):
        exchange(respond(raw))


def test_a_refused_connection_is_an_os_error() -> None:
    with pytest.raises(ConnectionError, match="connection refused"):
        request_sync("GET", "http://127.0.0.1:9/")


def test_the_time_limit_holds_for_the_whole_exchange() -> None:
    with pytest.raises(TimeoutError):
        exchange(respond(*[b"HTTP/1.1 200 OK\r\n"] + [b"a: b\r\n"] * 1000, pause_s=0.02), timeout_s=0.3)


def test_a_response_beyond_the_size_limit_is_not_read() -> None:
    head = b"HTTP/1.1 200 OK\r\n"
    with pytest.raises(ConnectionError, match="larger than 1000 bytes"):
        exchange(respond(head + b"Content-Length: 2000\r\n\r\n" + b"a" * 2000), max_bytes=1000)
    with pytest.raises(ConnectionError, match="larger than 1000 bytes"):
        exchange(respond(head + b"a: b\r\n" * 500), max_bytes=1000)


@pytest.mark.parametrize(
    "url",
    ["ftp://h/", "h:80/x", "http://", "http://h:99999/", "http://h:0/", "http://[::1", "http://h/a b", "http://h/ü"],
)
def test_an_invalid_url_is_a_value_error(url: str) -> None:
    with pytest.raises(ValueError, match=r"[Ii]nvalid|[Pp]ort"):
        request_sync("GET", url)


def test_no_header_can_smuggle_another() -> None:
    with pytest.raises(ValueError, match="Authorization"):
        request_sync("GET", "http://127.0.0.1:9/", headers=bearer("key\r\nX-Admin: 1"))


def test_it_sends_what_a_standard_server_understands() -> None:
    seen: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            seen.update(path=self.path, **{name.lower(): value for name, value in self.headers.items()})
            seen["body"] = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"ok": true}')

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        base = f"http://127.0.0.1:{server.server_port}"
        found = request_sync("PUT", f"{base}/a?b=c", json={"x": 1}, headers=bearer("key"))
        thread.join()
    assert (found.status, found.json()) == (200, {"ok": True})
    assert (seen["path"], seen["body"]) == ("/a?b=c", b'{"x":1}')
    assert (seen["authorization"], seen["host"]) == ("Bearer key", base.removeprefix("http://"))


def test_a_body_that_is_not_json_is_none() -> None:
    assert Response(200, b"\xff").json() is None
    assert Response(200, b"[" * 100_000).json() is None


def test_a_url_with_ipv6_and_a_path() -> None:
    assert split_url("https://[::1]:8443/hook").hostname == "::1"
