"""Devices as a user names them, with what-if changes: 'L4,A100-80G' and 'device.memory_bytes=48e9'."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from powerband.errors import UsageError
from powerband.spec.config_reader import shown
from powerband.spec.deployment import LOCAL, OLD_LOCAL, Replica
from powerband.spec.hardware.catalog import Catalog, load_catalog, read_prices
from powerband.spec.hardware.profile import DevicePrice, DeviceProfile
from powerband.spec.quantities import number


def chosen_devices(
    text: str,
    prices: Path | None,
    changes: Sequence[str],
    replicas: int | None = None,
    providers: str | None = None,
) -> list[DeviceProfile]:
    """'L4,A100' with the user's prices and changes. replicas: that share this machine, if that is asked for.

    providers: 'aws,gcp': the clouds whose prices count, beside the user's own; None: all.
    Raises UsageError or EnvironmentFault.
    """
    catalog = priced_catalog(prices, providers)
    names = list(dict.fromkeys(name for part in text.split(",") if (name := part.strip())))
    if not names:
        raise UsageError("No device is named.", hint="Like: --devices L4,A100-80G.", param="devices")
    facts = [(target, name) for target, name, _ in map(_change, changes) if target != "replica"]
    for _, name in facts:
        _check_fact(name)
    # This machine last: where it has not been calibrated, a typo among the others is what to say first.
    for name in (*names, *(target for target, _ in facts if target != "device")):
        if name not in (LOCAL, OLD_LOCAL):
            catalog.find(name)
    found = _distinct([catalog.find(name, replicas) for name in names])
    for change in changes:
        target, name, value = _change(change)
        if target != "replica":
            found = _changed(found, catalog, target, name, value)
    return found


def priced_catalog(prices: Path | None, providers: str | None) -> Catalog:
    """The catalog with the prices of some clouds, and with a user's own in place of them."""
    catalog = load_catalog()
    if providers is not None:
        names = [name for part in providers.split(",") if (name := part.strip().lower())]
        if not names:
            raise UsageError("No provider is named.", hint="Like: --provider aws.", param="provider")
        catalog = catalog.at_providers(names)
    return catalog if prices is None else catalog.with_prices(read_prices(prices))


def pinned_settings(changes: Sequence[str]) -> dict[str, Any]:
    """Of the changes, those of a replica: settings that every candidate must have. Raises UsageError."""
    hints = get_type_hints(Replica)
    found: dict[str, Any] = {}
    for change in changes:
        target, name, value = _change(change)
        if target != "replica":
            continue
        if name not in hints or name == "device":
            known = [item.name for item in fields(Replica) if item.name != "device"]
            raise _unknown(f"A replica has no {shown(name)}", name, known)
        found[name] = _typed(hints[name], value, change)
    return found


def _distinct(profiles: list[DeviceProfile]) -> list[DeviceProfile]:
    """Two names of one device are one device."""
    return list({profile.name: profile for profile in profiles}.values())


def _change(text: str) -> tuple[str, str, str]:
    """'device.memory_bytes=48e9' → ('device', 'memory_bytes', '48e9')."""
    where, sign, value = text.partition("=")
    target, dot, name = where.strip().partition(".")
    if not sign or not dot or not target or not name or not value.strip():
        raise UsageError(
            f"set is '{text}'.",
            hint="Write it like device.memory_bytes=48e9, L4.price=0.5 or replica.max_num_seqs=64.",
            param="set",
        )
    return target, name, value.strip()


def _check_fact(name: str) -> None:
    """Raises UsageError, with the nearest that there is."""
    known = ["price", *(item.name for item in fields(DeviceProfile))]
    if name.partition(".")[0] not in known:
        raise _unknown(f"A device has no {shown(name)}", name, known)


def _changed(
    profiles: list[DeviceProfile], catalog: Catalog, target: str, name: str, value: str
) -> list[DeviceProfile]:
    """One fact of all devices ('device'), or of the one that is named."""
    wanted = None if target == "device" else catalog.find(target).name
    if wanted is not None and wanted not in [profile.name for profile in profiles]:
        raise UsageError(f"{wanted} is not among the devices.", hint="Name it in --devices, too.", param="set")
    return [_with(profile, name, value) if wanted in (None, profile.name) else profile for profile in profiles]


def _with(profile: DeviceProfile, name: str, value: str) -> DeviceProfile:
    if name == "price":  # of one device, and of so many times as much for a layout on several
        dollars = number(value, param="set")
        price = DevicePrice(usd_per_hour=dollars, where="--set", source="--set", confidence="user")
        return replace(profile, prices=(price,))
    values = profile.as_dict()
    *tables, last = name.split(".")
    inner: Any = values
    for table in tables:
        inner = inner.setdefault(table, {}) if isinstance(inner, dict) else None
    if not isinstance(inner, dict):
        raise UsageError(f"{profile.name} has no {shown(name)}.", param="set")
    inner[last] = value
    return DeviceProfile.from_dict(values, f"--set {name}")


def _unknown(problem: str, name: str, known: Sequence[str]) -> UsageError:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    return UsageError(f"{problem}.", hint=f"{hint}Known: {', '.join(known)}.", param="set")


def _typed(hint: Any, value: str, change: str) -> Any:
    if hint in (int, float):
        found = number(value, param="set", low=-1.0)
        if hint is int and found != int(found):
            raise UsageError(f"set is '{change}'; a whole number is needed.", param="set")
        return hint(found)
    if hint is bool:
        if value.lower() not in ("true", "false"):
            raise UsageError(f"set is '{change}'; it is true or false.", param="set")
        return value.lower() == "true"
    return value
