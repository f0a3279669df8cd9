"""`powerband gateway`: one OpenAI-compatible address for many replicas, until a signal ends it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from powerband.cli.flags import takes_settings
from powerband.documents import read_table
from powerband.engines.base import ServerName
from powerband.errors import UsageError
from powerband.gateway.settings import GatewaySettings
from powerband.spec.settings_layers import Resolved

if TYPE_CHECKING:
    from powerband.gateway.routes import Routes

_MAX_ROUTES_BYTES = 4 << 20


@takes_settings(GatewaySettings)
def gateway(
    settings: Resolved,
    *,
    routes: Annotated[
        Path | None, Parameter(help="Routes to serve, in YAML or JSON; default: those of the last run")
    ] = None,
    replica: Annotated[
        tuple[str, ...], Parameter(help="URL of a replica; repeat for several; instead of --routes", negative="")
    ] = (),
    replica_engine: Annotated[
        ServerName | None,
        Parameter(help="Engine of these replicas; openai: any other server; default: detected"),
    ] = None,
) -> int:
    """Run a gateway: one OpenAI-compatible API for replicas that run elsewhere, until Ctrl-C or SIGTERM.

    The first signal drains: no new requests, and running ones may finish. The second stops at once.
    """
    if routes is not None and replica:
        raise UsageError("Both --routes and --replica are given.", hint="Give one.", param="replica")
    from powerband.gateway.run import serve

    if replica_engine is not None and not replica:
        raise UsageError(
            "--replica-engine needs --replica.",
            hint="With --routes, each replica names its engine.",
            param="replica_engine",
        )
    read = None if routes is None else read_routes(routes)
    return serve(settings.values[GatewaySettings], read, replica, replica_engine)


def read_routes(path: Path) -> Routes:
    """Raises EnvironmentFault and UsageError."""
    from powerband.gateway.routes import Routes

    return Routes.from_dict(read_table(path, "routes file", max_bytes=_MAX_ROUTES_BYTES, param="routes"))
