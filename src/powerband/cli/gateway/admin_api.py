"""A client of the gateway's admin API, for commands."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from powerband.cli.service.names import OldName
from powerband.errors import EnvironmentFault, PowerbandError, UsageError

TIMEOUT_S = 60.0


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class GatewayFlags:
    """Which gateway to ask, where it is not that of a service named as the first argument."""

    name: OldName = None
    url: Annotated[
        str | None, Parameter(help="Gateway, such as http://127.0.0.1:8080, instead of a deployed service")
    ] = None
    admin_key_file: Annotated[
        Path | None,
        Parameter(help="File with an admin key, for --url; default: the one of the gateway on this machine"),
    ] = None


class AdminApi:
    """Blocking. Raises PowerbandError: the gateway's own error, or EnvironmentFault when it does not respond."""

    def __init__(self, url: str, key: str) -> None:
        from powerband.http_client.request import split_url

        try:
            split_url(url)
        except ValueError:
            raise UsageError(f"Invalid URL {url!r}.", hint="Like http://127.0.0.1:8080.", param="url") from None
        self._url = url.rstrip("/")
        self._key = key

    def call(self, method: str, path: str, body: object = None) -> Any:
        """The decoded JSON of the response."""
        from powerband.http_client.request import bearer, request_sync

        headers = {**bearer(self._key), "X-Powerband-Actor": _user()}
        try:
            response = request_sync(method, self._url + path, json=body, headers=headers, timeout_s=TIMEOUT_S)
        except OSError as error:
            reason = str(error) or f"no response within {TIMEOUT_S:.0f} s"
            hint = "'powerband status' shows deployed services, '--url' names another gateway."
            raise EnvironmentFault(f"No gateway at {self._url}: {reason}.", hint=hint, param="url") from None
        except ValueError as error:  # a key or a path that no header can carry
            raise UsageError(f"Cannot send the request: {error}.", param="admin_key_file") from None
        found = response.json()
        if found is None:
            raise EnvironmentFault(f"The server at {self._url} is not a gateway.", param="url")
        if response.status >= 400:
            raise _as_error(response.status, found)
        return found


def find_gateway(flags: GatewayFlags | None, service: str | None = None) -> AdminApi:
    """The gateway of the service, else of the only one, or that of --url. Raises UsageError and EnvironmentFault."""
    from powerband.fleet.service.store import endpoint
    from powerband.folders import state_home

    flags = flags or GatewayFlags()
    url, admin_key_file = flags.url, flags.admin_key_file
    if url is None:
        if admin_key_file is not None:
            raise UsageError("--admin-key-file needs --url.", param="admin_key_file")
        try:
            return AdminApi(*endpoint(service, flags.name))
        except (UsageError, EnvironmentFault) as error:
            hint = f"{error.hint} --url names a gateway by its address.".strip()
            raise type(error)(error.message, hint=hint, param="service") from None
    if service is not None or flags.name is not None:
        raise UsageError("Both a service and --url are given.", hint="Give one.", param="url")
    file = admin_key_file or state_home() / "gateway" / "admin.key"
    try:
        key = file.read_text(encoding="ascii").strip()
        if not key:
            raise OSError(errno.ENODATA, "it is empty")
        return AdminApi(url, key)
    except (OSError, UnicodeDecodeError) as error:
        hint = "Name a file that holds an admin key with --admin-key-file."
        reason = error.strerror if isinstance(error, OSError) else "it holds no key"
        raise EnvironmentFault(f"Cannot read {file}: {reason}.", hint=hint, param="admin_key_file") from None


def _user() -> str:
    """For the audit log."""
    import getpass

    try:
        name = getpass.getuser()
    except (OSError, KeyError):
        return "unknown"
    return name if name.isascii() and name.isprintable() else "unknown"


def _as_error(status: int, body: Any) -> PowerbandError:
    error = body.get("error") if isinstance(body, dict) else None
    details = error if isinstance(error, dict) else {}
    message = str(details.get("message") or f"The gateway responded with HTTP {status}.")
    kind = UsageError if 400 <= status < 500 else PowerbandError
    return kind(message, code=str(details.get("code") or ""), param=details.get("param"))
