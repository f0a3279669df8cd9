"""`powerband devices`: what the planner knows of each device, and what it costs."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from powerband.cli.flags import Json
from powerband.cli.tables import print_table
from powerband.planner.report.device_table import device_rows
from powerband.spec.hardware.catalog import local_profiles
from powerband.spec.hardware.profile import DeviceProfile
from powerband.spec.hardware.what_if import priced_catalog

PRICES_HELP = "YAML: 'L4: 0.71' (dollars per hour, of one), or a list of usd_per_hour, devices, where"
PROVIDER_HELP = "Prices of these clouds only: aws, azure, gcp, lambda, runpod, vast"
_FOOTNOTES = """
TFLOP/s are dense peaks of the maker; prices are the lowest known for a machine with one device (x8: with
eight, its share), on demand, of any cloud (--provider aws: of one). 'speed known to' is the band of plans for
a model of 8 billion parameters in 16 bits on one device; prior: from relatives of the device, not measured.
'powerband devices NAME' shows the sources of speeds and prices; --prices FILE puts in your own."""


def devices(
    name: Annotated[
        str | None, Parameter(help="Only this one, with all that is known; a file describes another")
    ] = None,
    /,
    *,
    prices: Annotated[Path | None, Parameter(help=PRICES_HELP)] = None,
    provider: Annotated[str | None, Parameter(help=PROVIDER_HELP)] = None,
    json: Json = False,
) -> int:
    """Show the catalog of devices: facts, links, prices, and how sure their speed is.

    With NAME: its profile as YAML, which may be saved, changed and given to
    'powerband plan --devices FILE.yaml'.
    """
    catalog = priced_catalog(prices, provider)
    if name is not None:
        _print_profile(catalog.find(name), as_json=json)
        return 0
    profiles = [*local_profiles(), *catalog.profiles.values()]
    if json:
        print(json_format.dumps([profile.as_dict() for profile in profiles], indent=2))
        return 0
    print_table(device_rows(profiles))
    print(_FOOTNOTES)
    return 0


def _print_profile(profile: DeviceProfile, *, as_json: bool) -> None:
    if as_json:
        print(json_format.dumps(profile.as_dict(), indent=2))
        return
    import yaml

    print(yaml.safe_dump(profile.as_dict(), sort_keys=False, allow_unicode=True), end="")
