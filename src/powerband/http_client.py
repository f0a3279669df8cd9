"""An HTTP/1.1 client for control traffic: one request per connection, the whole response, a time and a size limit.

    response = await request("GET", f"{url}/readyz", timeout_s=2.0)
    response = request_sync("POST", f"{url}/admin/keys", json=body, headers=bearer(key))

It follows no redirects and uses no proxy. Generated tokens do not pass through it: the load generator and the gateway
stream with clients of their own.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import urllib.parse
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import httptools
import msgspec

MAX_RESPONSE_BYTES = 64 << 20
_READ_BYTES = 1 << 16
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f]")  # in a request line
_FORBIDDEN_IN_HEADERS = re.compile(r"[\x00\r\n]")
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    body: bytes

    def json(self) -> object:
        """The decoded body; None if it is not JSON."""
        with suppress(msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            return msgspec.json.decode(self.body)
        return None


def bearer(key: str) -> dict[str, str]:
    """The header that carries an API key; none for ''."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def split_url(url: str) -> urllib.parse.SplitResult:
    """Raises ValueError unless it is an http or https URL with a host."""
    parts = urllib.parse.urlsplit(url)  # ValueError: an invalid IPv6 address
    if parts.scheme not in _PORTS or not parts.hostname or parts.port == 0:  # .port: ValueError beyond 65535
        raise ValueError(f"invalid URL {url!r}: expected http://HOST[:PORT][/PATH] or https://…")
    return parts


async def request(
    method: str,
    url: str,
    *,
    json: object = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 10.0,
    max_bytes: int = MAX_RESPONSE_BYTES,
    tls: ssl.SSLContext | None = None,
) -> Response:
    """Send one request. json: the body, encoded here; None: no body. tls: for https; None: certificates are checked.

    Raises OSError when there is no valid response, TimeoutError (which is one) when it takes longer than `timeout_s`
    altogether, and ValueError for an invalid URL or header.
    """
    parts = split_url(url)
    data = b"" if json is None else msgspec.json.encode(json)
    head = _request_head(method, parts, data, headers or {})
    async with asyncio.timeout(timeout_s):
        try:
            reader, writer = await asyncio.open_connection(
                parts.hostname,
                parts.port or _PORTS[parts.scheme],
                ssl=(tls or True) if parts.scheme == "https" else None,
            )
        except ssl.SSLCertVerificationError as error:  # a ValueError, too, as if the URL were invalid
            raise ConnectionError(f"its certificate is not trusted: {error.verify_message}") from None
        try:
            writer.write(head + data)
            return await _read_response(reader, max_bytes)
        finally:
            writer.transport.abort()  # no waiting for the other side, which may hang


def request_sync(
    method: str,
    url: str,
    *,
    json: object = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 10.0,
) -> Response:
    """As `request`, for commands and threads that run no event loop."""
    return asyncio.run(request(method, url, json=json, headers=headers, timeout_s=timeout_s))


def _request_head(method: str, parts: urllib.parse.SplitResult, data: bytes, headers: Mapping[str, str]) -> bytes:
    target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    lines = {
        "Host": parts.netloc.rpartition("@")[2],
        "User-Agent": "powerband",
        "Connection": "close",
        "Content-Type": "application/json",
        "Content-Length": str(len(data)),
        **headers,
    }
    if not target.isascii() or _FORBIDDEN.search(target):
        raise ValueError(f"invalid path {target!r}: it has to be percent-encoded")
    for name, value in lines.items():
        if _FORBIDDEN_IN_HEADERS.search(f"{name}{value}"):
            raise ValueError(f"invalid value of the header {name}: it contains a line break")
    text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {target} HTTP/1.1\r\n{text}\r\n".encode()


async def _read_response(reader: asyncio.StreamReader, max_bytes: int) -> Response:
    message = _ResponseReader()
    received = 0
    while not message.is_complete:
        data = await reader.read(_READ_BYTES)
        if not data:
            break
        received += len(data)
        if received > max_bytes:
            raise ConnectionError(f"the response is larger than {max_bytes} bytes")
        message.feed(data)
    if not message.is_complete and not (message.status and message.ends_with_connection):
        raise ConnectionError("the connection was closed before the response was complete")
    return Response(message.status, b"".join(message.chunks))


class _ResponseReader:
    """Collects the final response from the parser's callbacks; informational ones (1xx) before it are skipped."""

    def __init__(self) -> None:
        self.status = 0  # 0: its headers are not complete
        self.chunks: list[bytes] = []
        self.ends_with_connection = True  # without a length or chunks, the body ends where the connection does
        self.is_complete = False
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Raises ConnectionError for anything but HTTP. Data after the complete response is ignored."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if not self.is_complete:
                raise ConnectionError(f"invalid HTTP response: {error}") from None

    def on_message_begin(self) -> None:
        if not self.is_complete:
            self.ends_with_connection = True

    def on_header(self, name: bytes, _value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self.ends_with_connection = False

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200 and not self.is_complete:
            self.status = status

    def on_body(self, body: bytes) -> None:
        if not self.is_complete:
            self.chunks.append(body)

    def on_message_complete(self) -> None:
        self.is_complete = self.status != 0
