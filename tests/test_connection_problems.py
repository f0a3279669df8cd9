"""Connections that fail say why in words, never with a number of an error."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket
import ssl

import pytest

from powerband.http_client.connection import ConnectionPool
from powerband.http_client.problems import connection_problem
from powerband.http_client.request import request_sync

CODES = [errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT, errno.EMFILE]
RAW = re.compile(r"Errno|\bSSL:|_ssl\.c|Connect call|Multiple exceptions")


def refused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def failure_of(url: str) -> str:
    with pytest.raises(OSError) as caught:  # noqa: PT011 (which one is not said)
        request_sync("GET", url)
    return str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_refused_connection_says_that_nothing_listens(host: str) -> None:
    assert failure_of(f"http://{host}:{refused_port()}/") == "connection refused: nothing listens on this port"


def test_a_name_that_no_server_knows_is_a_question_of_dns() -> None:
    assert "name of the host cannot be resolved" in failure_of("http://no-such-host.invalid/")


def test_https_to_a_port_that_speaks_http_says_which_scheme_to_use() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async def run() -> str:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            return await asyncio.to_thread(failure_of, url)

    assert asyncio.run(run()) == "it does not speak TLS on this port: use http:// instead of https://"


def test_the_connections_of_gateway_and_bench_say_it_alike() -> None:
    async def run() -> None:
        await ConnectionPool(f"http://127.0.0.1:{refused_port()}").take()

    with pytest.raises(OSError) as caught:  # noqa: PT011
        asyncio.run(run())
    assert connection_problem(caught.value) == "connection refused: nothing listens on this port"


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(code, os.strerror(code)) for code in CODES),
        *(OSError(code, f"Connect call failed ('127.0.0.1', 8000): {os.strerror(code)}") for code in CODES),
        OSError(
            "Multiple exceptions: [Errno 111] Connect call failed ('::1', 8, 0, 0), [Errno 101] Connect call failed"
        ),
        socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
        ssl.SSLError(1, "[SSL: TLSV1_ALERT_INTERNAL_ERROR] tlsv1 alert internal error (_ssl.c:1006)"),
        ssl.SSLEOFError(8, "EOF occurred in violation of protocol (_ssl.c:1006)"),
        TimeoutError(),
    ],
)
def test_no_text_is_the_systems_own(error: OSError) -> None:
    text = connection_problem(error)
    assert text
    assert not RAW.search(text)
