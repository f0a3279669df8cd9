"""Single requests, for control traffic: one per connection, with the whole response, a timeout and a size limit.

    response = await request("GET", f"{url}/readyz", timeout_s=2.0)
    response = request_sync("POST", f"{url}/admin/keys", json=body, headers=bearer(key))

It follows no redirects and uses no proxy.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import urllib.parse
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from powerband.errors import UsageError
from powerband.http_client.connection import CollectedResponse, OutboundConnection, request_head
from powerband.http_client.problems import connection_problem
from powerband.web.authority import split_authority

MAX_RESPONSE_BYTES = 64 << 20
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


def server_url(text: str, param: str = "url") -> str:
    """The base URL of an OpenAI-compatible server, however it was written: 'localhost:8000/v1' → 'http://localhost:8000'.

    Raises UsageError.
    """
    whole = text if "://" in text else f"http://{text}"
    try:
        parts = split_url(whole)
        is_address = not (parts.query or parts.fragment or "@" in parts.netloc)
    except ValueError:
        is_address = False
    if not is_address:
        hint = "Write it like http://localhost:8000."
        raise UsageError(f"'{text}' is not a server address.", hint=hint, param=param)
    split_authority(parts.netloc, 80)
    path = parts.path.rstrip("/")
    for known in ("/chat/completions", "/completions", "/v1"):
        path = path.removesuffix(known)
    return f"{parts.scheme}://{parts.netloc}{path}"


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
    """Send one request. json: the body, encoded here; None: no body. tls: for https; None: certificates are verified.

    Raises OSError if there is no valid response, with the reason in words, including TimeoutError after `timeout_s` in
    all, and ValueError for an invalid URL or header.
    """
    parts = split_url(url)
    data = b"" if json is None else msgspec.json.encode(json)
    head = _request_head(method, parts, len(data), headers or {})
    async with asyncio.timeout(timeout_s):
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                OutboundConnection,
                parts.hostname or "",
                parts.port or _PORTS[parts.scheme],
                ssl=(tls or True) if parts.scheme == "https" else None,
            )
        except OSError as error:  # of a certificate, it is a ValueError, too, which callers take for an invalid URL
            raise ConnectionError(connection_problem(error)) from None
        response = CollectedResponse(max_bytes)
        await connection.exchange((head, data), response)
    if response.code:
        raise ConnectionError(response.problem)
    return Response(response.status, response.body())


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


def _request_head(method: str, parts: urllib.parse.SplitResult, length: int, headers: Mapping[str, str]) -> bytes:
    target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    if not target.isascii() or _FORBIDDEN.search(target):
        raise ValueError(f"invalid path {target!r}: it has to be percent-encoded")
    for name, value in headers.items():
        if _FORBIDDEN_IN_HEADERS.search(f"{name}{value}"):
            raise ValueError(f"invalid value of the header {name}: it contains a line break")
    own = {"User-Agent": "powerband", "Connection": "close"}
    return request_head(method, target, parts.netloc.rpartition("@")[2], length, own | dict(headers))
