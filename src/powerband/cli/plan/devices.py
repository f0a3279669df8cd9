"""`powerband devices`: what the planner knows of each device, and what it costs."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from powerband.cli.flags import Json
from powerband.cli.tables import print_table
from powerband.cost.engine_priors import ENGINE_PRIORS
from powerband.engines.registry import ADAPTERS
from powerband.planner.device_band import device_band
from powerband.spec.deployment import ENGINES, EngineName
from powerband.spec.hardware.catalog import local_profiles, usd_per_hour
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
    profiles = list(catalog.profiles.values())
    profiles = [*local_profiles(), *profiles]
    if json:
        print(json_format.dumps([profile.as_dict() for profile in profiles], indent=2))
        return 0
    header = ("device", "memory", "bandwidth", "16-bit", "fp8", "int8", "link", "$/h", "where", "speed known to")
    print_table([header, *map(_row, sorted(profiles, key=_order))])
    print(_FOOTNOTES)
    return 0


def _order(profile: DeviceProfile) -> tuple[str, float, str]:
    return profile.architecture, profile.memory_bytes, profile.name


def _row(profile: DeviceProfile) -> tuple[str, ...]:
    peaks = profile.peak_flops_per_s
    link = profile.link or profile.host_link
    dollars, where = _price(profile)
    found = device_band(profile, _usual_engine(profile))
    return (
        profile.name,
        f"{profile.memory_bytes / 2**30:.0f} GiB",
        f"{profile.bandwidth_bytes_per_s / 1e9:.0f} GB/s",
        *(f"{peaks[dtype] / 1e12:.4g}" if dtype in peaks else "-" for dtype in ("16bit", "fp8", "int8")),
        f"{link.name} {link.bytes_per_s / 1e9:.0f} GB/s" if link is not None else "-",
        dollars,
        where,
        f"±{found.share:.0%} ({found.evidence})",
    )


def _usual_engine(profile: DeviceProfile) -> EngineName:
    """The first engine that runs on such a device and was measured there."""
    return next(
        name
        for name in ENGINES
        if profile.kind in ADAPTERS[name].capabilities.kinds
        and (profile.kind == "cpu" or ENGINE_PRIORS[name].is_measured_on_gpus)
    )


def _price(profile: DeviceProfile) -> tuple[str, str]:
    for devices_each in (1, profile.devices_per_node):
        found = usd_per_hour([p for p in profile.prices if p.devices == devices_each], 1, devices_each)
        if found is not None:
            dollars, machines = found
            times = f" x{devices_each}" if devices_each > 1 else ""
            return f"{dollars / devices_each:.2f}{times}", ", ".join(machines)
    return "-", "-"


def _print_profile(profile: DeviceProfile, *, as_json: bool) -> None:
    if as_json:
        print(json_format.dumps(profile.as_dict(), indent=2))
        return
    import yaml

    print(yaml.safe_dump(profile.as_dict(), sort_keys=False, allow_unicode=True), end="")
