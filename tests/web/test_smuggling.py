"""No bytes that one server takes for a body, and another for a request, are ever the next request here.

Each form sends a request inside of the body of another one. It is refused, or read as the body that h11 reads; the
request that is inside never reaches the application.
"""

from __future__ import annotations

import h11
import pytest
from connections_for_tests import Recorder, exchange, run, serving

INSIDE = b"GET /inside HTTP/1.1\r\nHost: localhost\r\n\r\n"
LENGTH = len(INSIDE)
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (LENGTH, INSIDE)

IN_CHUNKS = [
    "Transfer-Encoding: chunked",
    "Transfer-Encoding:chunked",
    "Transfer-Encoding:\tchunked",
    "Transfer-Encoding: \t chunked",
    "Transfer-Encoding: chunked ",
    "Transfer-Encoding: chunked\t",
    "transfer-encoding: CHUNKED",
    "TRANSFER-ENCODING: Chunked",
    "Transfer-Encoding : chunked",
    " Transfer-Encoding: chunked",
    "\tTransfer-Encoding: chunked",
    "Transfer-Encoding: xchunked",
    "Transfer-Encoding: chunkedx",
    'Transfer-Encoding: "chunked"',
    "Transfer-Encoding: chunked;q=1",
    "Transfer-Encoding: identity",
    "Transfer-Encoding: identity, chunked",
    "Transfer-Encoding: chunked, identity",
    "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: chunked, chunked",
    "Transfer-Encoding: ,chunked",
    "Transfer-Encoding: chunked,",
    "Transfer-Encoding:",
    "Transfer-Encoding: \x0bchunked",
    "Transfer-Encoding: \x0cchunked",
    "Transfer-Encoding: chunked\x00",
    "Transfer-Encoding: \xa0chunked",
    "Transfer-Encoding\x00: chunked",
    "Transfer-Encoding\r: chunked",
    "Transfer-Encoding: chunked\r",
    "Transfer-Encoding:\r\n chunked",
    "Transfer-Encoding:\n chunked",
    "X: x\nTransfer-Encoding: chunked",
    "X: x\rTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked\r\nContent-Length: 0",
    f"Transfer-Encoding: chunked\r\nContent-Length: {len(CHUNKED)}",
    f"Content-Length: {len(CHUNKED)}\r\nTransfer-Encoding: chunked",
    "Content-Length: 4\r\nTransfer-Encoding:\tchunked",
    "Content-Length: 4\r\nTransfer-Encoding: xchunked",
    "Transfer_Encoding: chunked\r\nTransfer-Encoding: chunked",
    "Connection: Transfer-Encoding\r\nTransfer-Encoding: chunked",
    "Connection: Upgrade\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked",
    "Expect: 100-continue\r\nTransfer-Encoding: chunked",
    "TE: trailers\r\nTrailer: Content-Length\r\nTransfer-Encoding: chunked",
]
OF_LENGTH = [
    f"Content-Length: {LENGTH}",
    f"Content-Length:{LENGTH}",
    f"Content-Length:\t{LENGTH}",
    f"Content-Length: {LENGTH} ",
    f"Content-Length: 0{LENGTH}",
    f"Content-Length : {LENGTH}",
    f" Content-Length: {LENGTH}",
    f"Content-Length: +{LENGTH}",
    f"Content-Length: -{LENGTH}",
    f"Content-Length: {LENGTH}.0",
    f"Content-Length: {LENGTH:#x}",
    f"Content-Length: {LENGTH}, {LENGTH}",
    f"Content-Length: {LENGTH},",
    f"Content-Length: {LENGTH} 0",
    f"Content-Length: \x0b{LENGTH}",
    "Content-Length: ",
    "Content-Length: \u00b2\u00b3",
    f"Content-Length: {LENGTH}\r\nContent-Length: {LENGTH}",
    f"Content-Length: {LENGTH}\r\nContent-Length: 0",
    f"Content-Length: 0\r\nContent-Length: {LENGTH}",
    f"Content-Length: {LENGTH}\nContent-Length: 0",
    f"Content-Length:\r\n {LENGTH}",
    f"Content-Length: {2**64 + LENGTH}",
    f"Content-Length: {2**32 + LENGTH}, {LENGTH}",
    f"Content-Length: {LENGTH}\r\nUpgrade: websocket\r\nConnection: Upgrade",
    f"Content-Length: {LENGTH}\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk",
    f"Content-Length: {LENGTH}\r\nExpect: 100-continue",
    f"Content-Length: {LENGTH}\r\nConnection: Content-Length",
    f"Content_Length: 0\r\nContent-Length: {LENGTH}",
]
CHUNKS = [
    b"0%x\r\n%b\r\n0\r\n\r\n" % (LENGTH, INSIDE),
    b"%x;name=value\r\n%b\r\n0\r\n\r\n" % (LENGTH, INSIDE),
    b'%x; name="a;b"\r\n%b\r\n0;last\r\n\r\n' % (LENGTH, INSIDE),
    b"%x\r\n%b\r\n0\r\nContent-Length: 5\r\nX: y\r\n\r\n" % (LENGTH, INSIDE),
    b"%X\r\n%b\r\n000\r\n\r\n" % (LENGTH, INSIDE),
    b"%x \r\n%b\r\n0\r\n\r\n" % (LENGTH, INSIDE),
    b" %x\r\n%b\r\n0\r\n\r\n" % (LENGTH, INSIDE),
    b"0x%x\r\n%b\r\n0\r\n\r\n" % (LENGTH, INSIDE),
    b"+%x\r\n%b\r\n0\r\n\r\n" % (LENGTH, INSIDE),
    b"%x\n%b\n0\n\n" % (LENGTH, INSIDE),
    b"%x\r%b\r\n0\r\n\r\n" % (LENGTH, INSIDE),
    b"%x;a\nb\r\n%b\r\n0\r\n\r\n" % (LENGTH, INSIDE),
    b"%x\r\n%b0\r\n\r\n" % (LENGTH, INSIDE),
    b"%x\r\n%bxx0\r\n\r\n" % (LENGTH, INSIDE),
    b"%x\r\n%b\r\n0\r\n bad: trailer\r\n\r\n" % (LENGTH, INSIDE),
    b"%x\r\n%b\r\n0\r\nbad trailer\r\n\r\n" % (LENGTH, INSIDE),
    b"%x\r\n%b\r\n0\r\nX: a\nb: c\r\n\r\n" % (LENGTH, INSIDE),
    b"1%x\r\n%b\r\n0\r\n\r\n" % (1 << 64, INSIDE),
    b"\r\n%x\r\n%b\r\n0\r\n\r\n" % (LENGTH, INSIDE),
    b"-1\r\n%b\r\n0\r\n\r\n" % INSIDE,
    b";\r\n%b\r\n0\r\n\r\n" % INSIDE,
]
METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW"]
LINES = [
    b"GET / HTTP/1.1\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n",
    b"GET / HTTP/1.1\r\nHost: a b\r\n",
    b"GET / HTTP/1.1\r\nHost: a, b\r\n",
    b"GET / HTTP/1.1\r\nHost: a/b\r\n",
    b"GET / HTTP/1.1\r\nHost: a@b\r\n",
    b"GET / HTTP/1.1\r\nHost: a:80:90\r\n",
    b"GET / HTTP/1.1\r\nHost: [::1\r\n",
    b"GET / HTTP/1.1\nHost: a\r\n",
    b"GET / HTTP/1.1 x\r\nHost: a\r\n",
    b"GET / x HTTP/1.1\r\nHost: a\r\n",
    b"GET /\x00 HTTP/1.1\r\nHost: a\r\n",
    b"GET / HTTP/2.0\r\nHost: a\r\n",
    b"GET / HTTP/1.2\r\nHost: a\r\n",
    b"GET / RTSP/1.0\r\nHost: a\r\n",
    b"GET /\r\nHost: a\r\n",
    b"get / HTTP/1.1\r\nHost: a\r\n",
    b"CONNECT localhost:80 HTTP/1.1\r\nHost: a\r\n",
    b"PRI * HTTP/2.0\r\nHost: a\r\n",
    b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nExpect: 200-ok\r\n",
]


def form(lines: str, body: bytes, method: str = "POST") -> bytes:
    return (
        f"{method} / HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n\r\n".encode("utf-8" if "\u00b2" in lines else "latin-1")
        + body
    )


FORMS = {
    **{f"{lines!r}": form(lines, CHUNKED) for lines in IN_CHUNKS},
    **{f"{lines!r}": form(lines, INSIDE) for lines in OF_LENGTH},
    **{f"chunks {body[:24]!r} {i}": form("Transfer-Encoding: chunked", body) for i, body in enumerate(CHUNKS)},
    **{f"{method} of a length": form(f"Content-Length: {LENGTH}", INSIDE, method) for method in METHODS},
    **{f"{method} in chunks": form("Transfer-Encoding: chunked", CHUNKED, method) for method in METHODS},
}


def read_by_h11(data: bytes) -> bytes | None:
    """The body of the first request; None: h11 refuses it."""
    client = h11.Connection(h11.SERVER)
    body = b""
    try:
        client.receive_data(data)
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA or event is h11.PAUSED:
                return None
            body += bytes(event.data) if isinstance(event, h11.Data) else b""
    except h11.RemoteProtocolError:
        return None
    return body


@pytest.mark.parametrize("data", FORMS.values(), ids=FORMS.keys())
def test_what_is_in_a_body_is_never_a_request(data: bytes) -> None:
    async def scenario() -> None:
        app = Recorder()
        async with serving(app) as port:
            end = b"GET /next HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            answers = await exchange(port, data + end)
        status = answers.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")[9:12]
        if status == b"200":
            assert app.seen == [("/", INSIDE), ("/next", b"")]
            assert read_by_h11(data) in (INSIDE, None)
        else:
            assert status in (b"400", b"501")
            assert not app.seen
            assert b"connection: close" in answers

    run(scenario)


@pytest.mark.parametrize("lines", LINES, ids=repr)
def test_heads_that_are_no_http_1_1_are_refused_and_end_the_connection(lines: bytes) -> None:
    async def scenario() -> None:
        app = Recorder()
        async with serving(app) as port:
            answers = await exchange(port, lines + b"\r\n" + INSIDE)
        assert answers[9:12] in (b"400", b"417", b"501", b"505")
        assert b"connection: close" in answers
        assert not app.seen

    run(scenario)


def test_the_plain_forms_are_taken() -> None:
    """So that the others are not refused for a reason of their own."""

    async def scenario() -> None:
        for lines, body in (("Transfer-Encoding:\tchunked", CHUNKED), (f"Content-Length: {LENGTH}", INSIDE)):
            app = Recorder()
            async with serving(app) as port:
                await exchange(port, form(lines + "\r\nConnection: close", body))
            assert app.seen == [("/", INSIDE)]

    run(scenario)


@pytest.mark.parametrize("host", ["a", "a_b.c-d:80", "127.0.0.1:1", "[::1]:80", "[fe80::1%25eth0]", "a:", ""])
def test_hosts_of_every_form_are_taken(host: str) -> None:
    async def scenario() -> None:
        async with serving(Recorder()) as port:
            answers = await exchange(port, f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        assert answers[9:12] == b"200"

    run(scenario)
