"""Which names and which pages may reach a server that asks for no key: web pages must not get in through a browser."""

from __future__ import annotations

import ipaddress

from starlette.requests import Request
from starlette.types import Scope

from powerband.web.errors import HttpError


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


def refuse_browsers(request: Request) -> None:
    """A page from elsewhere can make a browser send such a request; browsers then name the page's origin."""
    if "origin" in request.headers:
        raise HttpError(403, "origin_not_allowed", "Administration does not take requests from web pages.")


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
