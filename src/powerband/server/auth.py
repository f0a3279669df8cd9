"""Authentication: a wrapper around all routes, so that a new one is closed unless it is opened."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from powerband.errors import EnvironmentFault, UsageError
from powerband.server.settings import ServerSettings
from powerband.web.access import check_host, check_page, is_loopback
from powerband.web.anthropic import sent_keys
from powerband.web.errors import HttpError

# Probes: those of Kubernetes and of load balancers carry no key, and another Host than ours.
OPEN_PATHS = frozenset({"/livez", "/startupz", "/readyz", "/health"})


class BearerTokenMiddleware:
    """Lets a request through when it has the key. Without a key, only host names of this machine are served.

    Decides by `scope["path"]`, the very value that routes are matched with: what a client writes into Host or into an
    absolute URL cannot make the two differ.
    """

    def __init__(
        self, app: ASGIApp, key: str | None, host: str, *, any_host: bool = False, origins: Collection[str] = ()
    ) -> None:
        """origins: of web pages that may send requests without a key."""
        self._app = app
        self._origins = origins
        self._digest = hashlib.sha256(key.encode()).digest() if key else None
        self._host = host
        self._any_host = any_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in OPEN_PATHS:
            if self._digest is not None:
                self._check_key(sent_keys(scope))
            elif not self._any_host:
                check_host(scope, self._host)
                check_page(scope, self._origins)
        await self._app(scope, receive, send)

    def _check_key(self, values: list[bytes]) -> None:
        if not values:
            raise HttpError(
                401, "missing_api_key", "This server needs an API key.", hint="Send 'Authorization: Bearer KEY'."
            )
        scheme, _, key = values[0].partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        if self._digest is None or not hmac.compare_digest(digest, self._digest) or scheme.lower() != b"bearer":
            raise HttpError(401, "invalid_api_key", "The API key is wrong.")


def server_key(settings: ServerSettings) -> str | None:
    """The key to ask for. Raises UsageError when the server would be open to the network, unless asked for by name."""
    key = settings.api_key
    if settings.api_key_file is not None:
        if key is not None:
            raise UsageError("Both api_key and api_key_file are given.", hint="Give one.", param="api_key_file")
        key = _read_key(Path(settings.api_key_file))
    if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
        raise UsageError("The API key must be printable ASCII without spaces, and not empty.", param="api_key")
    if key is None and not settings.insecure and not is_loopback(settings.host):
        raise UsageError(
            f"Listening on {settings.host} without an API key would let anyone in.",
            hint="Give --api-key-file, or say --insecure if that is wanted.",
            param="host",
        )
    if key is not None and settings.insecure:
        raise UsageError("insecure has no effect with an API key.", hint="Leave it out.", param="insecure")
    return key


def _read_key(file: Path) -> str:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EnvironmentFault(f"Cannot read {file}: {reason}.", code="api_key_file", param="api_key_file") from error
    return lines[0].strip() if lines else ""
