"""Which gateway a command asks."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from powerband.cli.service.names import OldName
from powerband.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
    from powerband.http_client.admin_client import AdminClient


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


def find_gateway(flags: GatewayFlags | None, service: str | None = None) -> AdminClient:
    """The gateway of the service, else of the only one, or that of --url. Raises UsageError and EnvironmentFault."""
    from powerband.fleet.service.store import endpoint
    from powerband.folders import state_home
    from powerband.http_client.admin_client import AdminClient

    flags = flags or GatewayFlags()
    url, admin_key_file = flags.url, flags.admin_key_file
    if url is None:
        if admin_key_file is not None:
            raise UsageError("--admin-key-file needs --url.", param="admin_key_file")
        try:
            return AdminClient(*endpoint(service, flags.name))
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
        return AdminClient(url, key)
    except (OSError, UnicodeDecodeError) as error:
        hint = "Name a file that holds an admin key with --admin-key-file."
        reason = error.strerror if isinstance(error, OSError) else "it holds no key"
        raise EnvironmentFault(f"Cannot read {file}: {reason}.", hint=hint, param="admin_key_file") from None
