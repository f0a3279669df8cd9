"""Requests beside the load, to a server whose certificate no authority has signed (localhost.pem, for tests only)."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest

from powerband.bench.client.http import get
from powerband.bench.client.messages import ServerAddress
from powerband.http_client.request import Response

CERTIFICATE = Path(__file__).with_name("localhost.pem")


def models(*, insecure: bool) -> Response:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        await writer.drain()
        writer.close()

    async def run() -> Response:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        base = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        target = ServerAddress(base=base, endpoint="chat", model="demo", insecure=insecure)
        try:
            return await get(target, "/v1/models")
        finally:
            server.close()

    return asyncio.run(run())


def test_a_certificate_of_its_own_is_refused() -> None:
    with pytest.raises(ConnectionError, match="certificate is not trusted: self-signed"):
        models(insecure=False)


def test_insecure_takes_any_certificate() -> None:
    assert models(insecure=True).json() == {}
