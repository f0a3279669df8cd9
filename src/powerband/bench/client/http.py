"""Single requests to the server under test, beside the load: what it is, what it says about itself."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import msgspec

from powerband.bench.client.connection import ConnectionPool
from powerband.bench.client.messages import ServerAddress


@dataclass(frozen=True, slots=True)
class HTTPPage:
    status: int
    body: bytes

    def json(self) -> object:
        """None where it is none."""
        try:
            return msgspec.json.decode(self.body)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            return None


async def get(target: ServerAddress, path: str, *, timeout_s: float = 10.0) -> HTTPPage:
    """path: from the server's root, or a whole URL. Raises OSError and TimeoutError."""
    return await _request(target, "GET", path, b"", timeout_s)


async def post(target: ServerAddress, path: str, body: object, *, timeout_s: float = 120.0) -> HTTPPage:
    """body: becomes JSON. Raises OSError and TimeoutError."""
    return await _request(target, "POST", path, msgspec.json.encode(body), timeout_s)


async def put(target: ServerAddress, path: str, body: object, *, timeout_s: float = 10.0) -> HTTPPage:
    """body: becomes JSON. Raises OSError and TimeoutError."""
    return await _request(target, "PUT", path, msgspec.json.encode(body), timeout_s)


async def delete(target: ServerAddress, path: str, *, timeout_s: float = 10.0) -> HTTPPage:
    """Raises OSError and TimeoutError."""
    return await _request(target, "DELETE", path, b"", timeout_s)


async def _request(target: ServerAddress, method: str, path: str, body: bytes, timeout_s: float) -> HTTPPage:
    if "://" in path:
        scheme, _, rest = path.partition("://")
        authority, _, below = rest.partition("/")
        target, path = msgspec.structs.replace(target, base=f"{scheme}://{authority}"), f"/{below}"
    authority, _, prefix = target.base.partition("://")[2].partition("/")
    headers = {"Host": authority, "Content-Type": "application/json", "Content-Length": str(len(body))} | target.headers
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    whole = f"/{prefix.rstrip('/')}{path}" if prefix else path
    connections = ConnectionPool(target)
    async with asyncio.timeout(timeout_s):
        connection, _ = await connections.take()
        try:
            answer, done = connection.exchange(f"{method} {whole} HTTP/1.1\r\n{lines}\r\n".encode() + body)
            await done
        finally:
            connection.close()
    if answer.problem:
        raise ConnectionError(answer.problem)
    return HTTPPage(answer.status, answer.body())
