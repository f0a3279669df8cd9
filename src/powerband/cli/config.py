"""`powerband config show`: every effective setting and where it came from."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict

from powerband.cli.flags import ALL_SETTINGS, Json, takes_settings
from powerband.cli.settings import Resolved
from powerband.cli.tables import print_table

HIDDEN = "(set, not shown)"


@takes_settings(*ALL_SETTINGS)
def show(settings: Resolved, *, json: Json = False) -> int:
    """Print every effective setting, its value and where it came from.

    Takes the same options as 'powerband serve'.
    """
    values = {name: value for part in settings.values.values() for name, value in asdict(part).items()}
    shown = {name: HIDDEN if value and name == "api_key" else value for name, value in values.items()}
    if json:
        rows = {name: {"value": value, "origin": settings.origins[name]} for name, value in shown.items()}
        print(json_format.dumps(rows, indent=2))
    else:
        print_table(
            [(name, "-" if value is None else str(value), settings.origins[name]) for name, value in shown.items()]
        )
    return 0
