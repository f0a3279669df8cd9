"""A client of a gateway's admin API."""

from __future__ import annotations

import getpass
from typing import Any

from powerband.errors import EnvironmentFault, PowerbandError, UsageError
from powerband.http_client.request import bearer, request_sync, split_url

TIMEOUT_S = 60.0


class AdminClient:
    """Blocking. Raises PowerbandError: the gateway's own error, or EnvironmentFault when it does not respond."""

    def __init__(self, url: str, key: str) -> None:
        try:
            split_url(url)
        except ValueError:
            raise UsageError(f"Invalid URL {url!r}.", hint="Like http://127.0.0.1:8080.", param="url") from None
        self._url = url.rstrip("/")
        self._key = key

    def call(self, method: str, path: str, body: object = None) -> Any:
        """The decoded JSON of the response."""
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


def _user() -> str:
    """For the audit log."""
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
