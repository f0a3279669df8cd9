"""The admin API of a gateway, for commands: which gateway, with which key, and its errors as ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from powerband.errors import EnvironmentFault, PowerbandError, UsageError

TIMEOUT_S = 60.0

Service = Annotated[str | None, Parameter(help="Deployed service; default: the only one")]
Url = Annotated[str | None, Parameter(help="Gateway, such as http://127.0.0.1:8080, instead of a deployed service")]
AdminKeyFile = Annotated[
    Path | None, Parameter(help="File with an admin key, for --url; default: that of a gateway on this machine")
]


class AdminApi:
    """Blocking. Raises PowerbandError: what the gateway says, or EnvironmentFault when there is none."""

    def __init__(self, url: str, key: str) -> None:
        import urllib.parse

        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url!r} is no URL.", hint="Like http://127.0.0.1:8080.", param="url")
        self._parts = parts
        self._url = url
        self._key = key

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The decoded JSON of the answer."""
        import http.client

        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=TIMEOUT_S)
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        headers["X-Powerband-Actor"] = _user()
        data = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, self._parts.path.rstrip("/") + path, data, headers)
            answer = connection.getresponse()
            status, text = answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            hint = "'powerband status' shows deployed services, '--url' names another gateway."
            raise EnvironmentFault(f"No gateway answers at {self._url}: {error}.", hint=hint, param="url") from None
        finally:
            connection.close()
        try:
            found = json.loads(text)
        except ValueError:
            raise EnvironmentFault(f"What answers at {self._url} is no gateway.", param="url") from None
        if status >= 400:
            raise _as_error(status, found)
        return found


def find_gateway(service: str | None, url: str | None, admin_key_file: Path | None) -> AdminApi:
    """By service, or by URL and key. Raises UsageError and EnvironmentFault."""
    from powerband.fleet.service.store import endpoint
    from powerband.folders import state_home

    if url is None:
        if admin_key_file is not None:
            raise UsageError("--admin-key-file needs --url.", param="admin_key_file")
        try:
            return AdminApi(*endpoint(service))
        except UsageError as error:
            hint = "Name one with --service, or a gateway that was not deployed with --url."
            raise UsageError(error.message, hint=hint, param="service") from None
    if service is not None:
        raise UsageError("Both --service and --url are given.", hint="Give one.", param="service")
    file = admin_key_file or state_home() / "gateway" / "admin.key"
    try:
        return AdminApi(url, file.read_text(encoding="ascii").strip())
    except (OSError, UnicodeDecodeError) as error:
        hint = "Name a file that holds an admin key with --admin-key-file."
        raise EnvironmentFault(f"The admin key {file} cannot be read: {error}.", hint=hint) from None


def _user() -> str:
    """For the audit."""
    import getpass

    try:
        name = getpass.getuser()
    except (OSError, KeyError):
        return "somebody"
    return name if name.isascii() and name.isprintable() else "somebody"


def _as_error(status: int, body: Any) -> PowerbandError:
    error = body.get("error") if isinstance(body, dict) else None
    told = error if isinstance(error, dict) else {}
    message = str(told.get("message") or f"The gateway answers with HTTP {status}.")
    kind = UsageError if 400 <= status < 500 else PowerbandError
    return kind(message, code=str(told.get("code") or ""), param=told.get("param"))
