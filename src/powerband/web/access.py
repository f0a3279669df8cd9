"""Which names and which pages may reach a server that asks for no key: web pages must not get in through a browser."""

from __future__ import annotations

import ipaddress

from starlette.requests import Request
from starlette.types import Scope

from powerband.web.errors import HttpError

_SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS"))


def check_host(scope: Scope, host: str) -> None:
    """Without a key, a web page could reach a server through a name of its own that it points at loopback.

    host: on which the server listens. Raises HttpError 403 unless Host is an address, localhost, or that.
    """
    for header, value in scope["headers"]:
        if header != b"host":
            continue
        name = _host_name(value.decode("latin-1")).lower()
        if name not in ("localhost", host.lower()) and not _is_address(name):
            raise HttpError(
                403,
                "host_not_allowed",
                f"Without an API key this server does not answer to the name {name[:80]!r}.",
                hint="Use localhost or the address, or start it with --api-key.",
            )


def check_page(scope: Scope) -> None:
    """Without a key, any web page that the user has open could send requests: browsers send them, and hide only the
    answer. They name the page's origin in every request that changes something, and ask first (with OPTIONS, which no
    route takes) before they send JSON for another page.

    A page of this server's own comes in. Raises HttpError 403 for pages from elsewhere, and 415 for a body that is not
    said to be JSON.
    """
    if scope["method"] in _SAFE_METHODS:
        return
    headers = dict(scope["headers"])
    origin, host = headers.get(b"origin"), headers.get(b"host", b"")
    is_foreign = origin is not None and origin.partition(b"://")[2].lower() != host.lower()
    if is_foreign or headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin"):
        raise HttpError(
            403,
            "origin_not_allowed",
            f"Without an API key this server takes no requests from other web pages, such as {_shown(origin)}.",
            hint="Start it with a key.",
        )
    has_body = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
    if has_body and b"content-type" not in headers:
        raise HttpError(
            415, "unsupported_media_type", "The request names no content type.", hint="Send application/json."
        )


def refuse_browsers(request: Request) -> None:
    """A page from elsewhere can make a browser send such a request; browsers then name the page's origin."""
    if "origin" in request.headers:
        raise HttpError(403, "origin_not_allowed", "Administration does not take requests from web pages.")


def _shown(origin: bytes | None) -> str:
    return repr((origin or b"").decode("latin-1")[:80])


def is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _host_name(host: str) -> str:
    """The Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and ":" in host else host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
