"""The head of a request: parsed by httptools, in C, and checked against RFC 9110 and 9112 wherever two servers could
interpret it differently (request smuggling). The framing of the body is decided only here.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass

import httptools

from powerband.web.errors import HttpError

MAX_HEADERS = 200
MAX_REQUEST_LINE_BYTES = 8 << 10  # the minimum that RFC 9112, 3 recommends
_NOT_CONTROLS = bytes({*range(0x20, 0x100), *b"\t\r\n"} - {0x7F})  # the parser wants \r and \n in pairs
_CLOSE = re.compile(rb"(?:^|,)[ \t]*+close[ \t]*+(?:,|$)", re.IGNORECASE)
_LENGTH = re.compile(rb"[0-9]{1,15}")
_HOST = re.compile(rb"(?:\[[0-9A-Za-z:.%_~-]+\]|[0-9A-Za-z._~!$&'()*+,;=%-]*)(?::[0-9]*)?")
_MEANT_FOR_US = frozenset((b"connection", b"content-length", b"expect", b"host", b"transfer-encoding"))

Headers = list[tuple[bytes, bytes]]


@dataclass(slots=True)
class RequestHead:
    """headers: names in lower case. body_length: in bytes; None: it comes in chunks."""

    method: str
    http_version: str
    path: str
    raw_path: bytes
    query: bytes
    headers: Headers
    body_length: int | None
    keeps_connection: bool
    awaits_continue: bool


def parse_head(data: bytes) -> RequestHead:
    """data: from the request line to the empty line, inclusive. Raises HttpError 400, 414, 417, 431, 501 and 505."""
    request_line = data[: data.find(b"\r\n")]
    if len(request_line) > MAX_REQUEST_LINE_BYTES:
        raise HttpError(414, "target_too_long", f"The request line is longer than {MAX_REQUEST_LINE_BYTES} bytes.")
    if data.count(b"\n") > MAX_HEADERS + 2:  # before the parser makes a callback for each
        raise HttpError(431, "head_too_large", f"The request has more than {MAX_HEADERS} headers.")
    if data.translate(None, _NOT_CONTROLS):
        raise _invalid("The head has control characters")
    fields = _Fields()
    parser = httptools.HttpRequestParser(fields)
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade:
        pass  # a server may ignore Upgrade (RFC 9110, 7.8)
    except httptools.HttpParserError as problem:
        raise _invalid(str(problem)) from None
    if not fields.is_complete:
        raise _invalid("The head has no end")
    version, method = parser.get_http_version(), parser.get_method().decode("ascii")
    if not request_line.endswith((b" HTTP/1.1", b" HTTP/1.0")):
        raise HttpError(505, "http_version_not_supported", "The protocol of the request is not HTTP 1.1.")
    if method == "CONNECT":
        raise HttpError(501, "not_a_proxy", "CONNECT asks for a proxy, which this server is not.")
    url = _parse_target(fields.url)
    meant = fields.meant
    _check_host(meant.get(b"host", ()), url.host, fields.headers, version)
    expected = meant.get(b"expect", ())
    if expected and (len(expected) > 1 or expected[0].lower() != b"100-continue"):
        raise HttpError(417, "expectation_failed", "The only expectation that this server can meet is 100-continue.")
    keeps = version == "1.1"
    for value in meant.get(b"connection", ()):
        keeps = keeps and _CLOSE.search(value) is None
    path = url.path.decode("ascii")
    return RequestHead(
        method=method,
        http_version=version,
        path=urllib.parse.unquote(path) if "%" in path else path,
        raw_path=url.path,
        query=url.query or b"",
        headers=fields.headers,
        body_length=_body_length(meant.get(b"content-length", ()), meant.get(b"transfer-encoding", ()), version),
        keeps_connection=keeps,
        awaits_continue=bool(expected) and version == "1.1",
    )


class _Fields:
    """Collects the parser's callbacks. `meant`: values of the headers that the server itself interprets."""

    __slots__ = ("headers", "is_complete", "meant", "url")

    def __init__(self) -> None:
        self.url = b""
        self.headers: Headers = []
        self.meant: dict[bytes, list[bytes]] = {}
        self.is_complete = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes | None) -> None:
        name, value = name.lower(), (value or b"").strip(b" \t")
        if name in _MEANT_FOR_US:
            self.meant.setdefault(name, []).append(value)
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.is_complete = True


def _parse_target(target: bytes) -> httptools.parser.url_parser.URL:
    try:
        url = httptools.parse_url(target)
    except httptools.HttpParserInvalidURLError:
        raise _invalid("The request's target is no URL") from None
    if not url.path or not url.path.isascii():
        raise _invalid("The request's target has no path in ASCII")
    return url


def _check_host(hosts: Sequence[bytes], of_target: bytes | None, headers: Headers, version: str) -> None:
    """Require exactly one Host (RFC 9112, 3.2). The host of an absolute target replaces it."""
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        raise _invalid(f"The request has {len(hosts)} Host headers in place of one")
    if hosts and not _HOST.fullmatch(hosts[0]):
        raise _invalid("Host is no name or address, with or without a port")
    if of_target is not None:
        headers[:] = [(name, value) for name, value in headers if name != b"host"] + [(b"host", of_target)]


def _body_length(lengths: Sequence[bytes], codings: Sequence[bytes], version: str) -> int | None:
    """RFC 9112, 6.3, at its strictest: one length in digits, or chunked alone, and never both."""
    if codings and (lengths or version == "1.0"):
        raise _invalid("Transfer-Encoding goes with HTTP 1.1, and without Content-Length")
    if codings:
        if [coding.lower() for coding in codings] != [b"chunked"]:
            raise HttpError(501, "unsupported_transfer_coding", "The only transfer coding taken here is chunked, once.")
        return None
    if not lengths:
        return 0
    if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
        raise _invalid("Content-Length is not one number of at most 15 digits")
    return int(lengths[0])


def _invalid(what: str) -> HttpError:
    return HttpError(400, "invalid_http", f"{what}.")
