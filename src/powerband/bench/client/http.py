"""Single requests to the server under test, outside the load: which model it serves, its metrics, its health."""

from __future__ import annotations

from powerband.bench.client.messages import ServerAddress
from powerband.errors import UsageError
from powerband.http_client.connection import tls_context
from powerband.http_client.request import Response, request


async def get(target: ServerAddress, path: str, *, timeout_s: float = 10.0) -> Response:
    """path: below the server's base URL, or a whole URL. Raises OSError and UsageError."""
    return await _request("GET", target, path, None, timeout_s)


async def post(target: ServerAddress, path: str, body: object, *, timeout_s: float = 120.0) -> Response:
    """body: sent as JSON. Raises OSError and UsageError."""
    return await _request("POST", target, path, body, timeout_s)


async def delete(target: ServerAddress, path: str, *, timeout_s: float = 10.0) -> Response:
    """Raises OSError and UsageError."""
    return await _request("DELETE", target, path, None, timeout_s)


async def _request(method: str, target: ServerAddress, path: str, body: object, timeout_s: float) -> Response:
    url = path if "://" in path else target.base.rstrip("/") + path
    tls = tls_context(insecure=True) if target.insecure else None
    try:
        return await request(method, url, json=body, headers=target.headers, timeout_s=timeout_s, tls=tls)
    except ValueError as error:
        raise UsageError(f"Cannot send a request to {url}: {error}.", param="url") from None
