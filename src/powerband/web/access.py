"""Which web pages may use an API: none, unless the operator names their origins (Fetch standard, CORS).

Without an API key, a server checks host and origin itself, because browsers send some requests before they ask.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Scope

from powerband.web.errors import HttpError
from powerband.web.origins import ANY_ORIGIN

# Headers of responses that a page may read besides the usual ones.
_READABLE = (
    *("Retry-After", "X-Request-Id", "X-Ignored-Fields", "X-RateLimit-Limit-Requests", "X-RateLimit-Limit-Tokens"),
    *("X-RateLimit-Remaining-Requests", "X-RateLimit-Remaining-Tokens"),
    *("X-RateLimit-Reset-Requests", "X-RateLimit-Reset-Tokens"),
)
_SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS"))


def check_host(scope: Scope, host: str) -> None:
    """Prevent DNS rebinding: without a key, a web page could reach the server through a domain that points to loopback.

    host: the address that the server listens on. Raises HttpError 403 unless Host is an IP address, localhost or that.
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


def allow_pages(app: ASGIApp, origins: Collection[str]) -> ASGIApp:
    """The application with CORS headers for pages of these origins; itself if there are none.

    It answers preflights, which carry no key. It wraps everything else, so that pages can read errors, too.
    """
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        allow_private_network=True,  # the operator has named the page, wherever it comes from
        expose_headers=_READABLE,
    )


def check_page(scope: Scope, allowed: Collection[str] = ()) -> None:
    """Prevent cross-site requests: without a key, any web page that the user has open could send requests.

    Browsers send such requests and only hide the response. They add the page's Origin to every unsafe request, and send
    a preflight (OPTIONS, which no route accepts) before a cross-origin request with JSON. Raises HttpError 403 for a
    page of another origin that is not allowed, and 415 for a body without a content type.
    """
    if scope["method"] in _SAFE_METHODS:
        return
    headers = dict(scope["headers"])
    origin, host = headers.get(b"origin"), headers.get(b"host", b"")
    is_foreign = origin is not None and origin.partition(b"://")[2].lower() != host.lower()
    is_foreign = is_foreign or headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin")
    if is_foreign and not (origin is not None and (ANY_ORIGIN in allowed or origin.decode("latin-1") in allowed)):
        raise HttpError(
            403,
            "origin_not_allowed",
            f"Without an API key this server takes no requests from other web pages, such as {_shown(origin)}.",
            hint="Start it with --allowed-origins and the page's origin.",
        )
    has_body = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
    if has_body and b"content-type" not in headers:
        raise HttpError(
            415, "unsupported_media_type", "The request names no content type.", hint="Send application/json."
        )


def refuse_browsers(request: Request) -> None:
    """Reject requests that a web page made a browser send: those have an Origin header."""
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
