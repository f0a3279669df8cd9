"""How commands name a service: as their first argument."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

SERVICE_HELP = "Service; default: the only one"
Service = Annotated[str | None, Parameter(help=SERVICE_HELP)]
# As commands of the version before named it; it still works, and help does not show it.
OldName = Annotated[str | None, Parameter(name=("--name", "--service"), show=False)]
