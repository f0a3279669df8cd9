"""The catalog of devices as a table."""

from __future__ import annotations

from collections.abc import Iterable

from powerband.cost.engine_priors import ENGINE_PRIORS
from powerband.engines.registry import ADAPTERS
from powerband.planner.device_band import device_band
from powerband.spec.deployment import ENGINES, EngineName
from powerband.spec.hardware.catalog import usd_per_hour
from powerband.spec.hardware.profile import DeviceProfile

_HEADINGS = ("device", "memory", "bandwidth", "16-bit", "fp8", "int8", "link", "$/h", "where", "speed known to")


def device_rows(profiles: Iterable[DeviceProfile]) -> list[tuple[str, ...]]:
    """Headings, then a row for each device, by architecture and memory."""
    return [_HEADINGS, *map(_row, sorted(profiles, key=_order))]


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
