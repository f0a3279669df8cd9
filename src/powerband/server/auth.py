"""Who may come in: a wrapper around the whole application, so that a new route is closed until someone opens it."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from powerband.errors import EnvironmentFault, UsageError
from powerband.server.settings import ServerSettings
from powerband.web.errors import HttpError

OPEN_PATHS = frozenset({"/livez"})


class Gatekeeper:
    """Lets a request through when it brings the key. Without a key, only names that mean this machine are served.

    Decides by `scope["path"]`, the very value that routes are matched with: what a client writes into Host or into an
    absolute URL cannot make the two differ.
    """

    def __init__(self, app: ASGIApp, key: str | None, host: str, *, any_host: bool = False) -> None:
        self._app = app
        self._digest = hashlib.sha256(key.encode()).digest() if key else None
        self._host = host.lower()
        self._any_host = any_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in OPEN_PATHS:
            headers = [(name, value) for name, value in scope["headers"] if name in (b"authorization", b"host")]
            if self._digest is not None:
                self._check_key([value for name, value in headers if name == b"authorization"])
            elif not self._any_host:
                self._check_host([value for name, value in headers if name == b"host"])
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

    def _check_host(self, values: list[bytes]) -> None:
        """Without a key, a web page could reach this server through a name of its own that it points at loopback."""
        for value in values:
            name = _host_name(value.decode("latin-1")).lower()
            if name not in ("localhost", self._host) and not _is_address(name):
                raise HttpError(
                    403,
                    "host_not_allowed",
                    f"Without an API key this server does not answer to the name {name[:80]!r}.",
                    hint="Use localhost or the address, or start it with --api-key.",
                )


def server_key(settings: ServerSettings) -> str | None:
    """The key to ask for. Raises UsageError when the server would be open to the network, unless asked for by name."""
    key = settings.api_key
    if settings.api_key_file is not None:
        if key is not None:
            raise UsageError("Both api_key and api_key_file are given.", hint="Give one.", param="api_key_file")
        key = _read_key(Path(settings.api_key_file))
    if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
        raise UsageError("The API key must be printable ASCII without spaces, and not empty.", param="api_key")
    if key is None and not settings.insecure and not _is_loopback(settings.host):
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
        raise EnvironmentFault(f"The key file {file} cannot be read: {error}.", code="api_key_file") from error
    return lines[0].strip() if lines else ""


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


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
