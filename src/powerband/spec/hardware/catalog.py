"""The devices that are known: those of the project's catalog, this machine's, and those that a user describes.

catalog/l4.yaml … ─┐
local.yaml ────────┼─► Catalog ── find('L4', 'local', './mine.yaml') ──► DeviceProfile
prices of a user ──┘
"""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

from powerband.documents import parse_table, read_table
from powerband.errors import EnvironmentFault, UsageError
from powerband.files import write_atomically
from powerband.folders import WRITABLE_CACHE, cache_directory
from powerband.renamed import warn_renamed
from powerband.spec.config_reader import shown
from powerband.spec.deployment import LOCAL, OLD_LOCAL, local_name
from powerband.spec.hardware.device import detect_cpu
from powerband.spec.hardware.profile import DevicePrice, DeviceProfile
from powerband.spec.quantities import count_text
from powerband.spec.yaml_codec import read_record

NOT_MEASURED = "not_measured"  # code of an error
_MAX_BYTES = 4 << 20


def _comparable(name: str) -> str:
    """A device's name without case and separators, for 'A100 80GB', 'a100-80gb' and 'A100_80GB' are one."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _near(wanted: str, known: Mapping[str, DeviceProfile]) -> str:
    """What may have been meant by a name that is not known. known: profiles by their comparable names."""
    if wanted in ("cpu", "cuda", "gpu"):
        return f"'{LOCAL}' is this machine. "
    within = [name for name in known if len(wanted) > 1 and wanted in name]
    names = dict.fromkeys(known[name].name for name in within or difflib.get_close_matches(wanted, known, n=2))
    return f"Did you mean {' or '.join([*names][:3])}? " if names else ""


@dataclass(frozen=True, slots=True)
class Catalog:
    """profiles: by name."""

    profiles: Mapping[str, DeviceProfile]

    def find(self, name: str, replicas: int | None = None) -> DeviceProfile:
        """By name or alias in any case and with any separators; 'local': this machine's profile, for so many replicas
        that share it; a path: the profile in that file.

        Raises UsageError for an unknown name, EnvironmentFault where a file or a calibration is missing.
        """
        if local_name(name) == LOCAL:
            return read_local_profile(replicas)
        if name.endswith((".yaml", ".yml")):
            return read_profile(Path(name))
        wanted = _comparable(name)
        known = {
            _comparable(one): profile for profile in self.profiles.values() for one in (profile.name, *profile.aliases)
        }
        if wanted in known:
            return known[wanted]
        raise UsageError(
            f"There is no device {shown(name)} in the catalog.",
            hint=f"{_near(wanted, known)}'powerband devices' lists all; a file NAME.yaml describes another one.",
            param="devices",
        )

    def at_providers(self, providers: Collection[str]) -> Catalog:
        """With the prices of these clouds only. Raises UsageError for one of which no price is known."""
        prices = [price for profile in self.profiles.values() for price in profile.prices]
        known = sorted({name for price in prices for name in price.providers})
        for name in providers:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean {near[0]}? " if near else ""
                raise UsageError(
                    f"No price of the provider {shown(name)} is known.",
                    hint=f"{hint}Known: {', '.join(known)}.",
                    param="provider",
                )
        return Catalog(
            {
                name: replace(
                    profile, prices=tuple(price for price in profile.prices if {*price.providers} & {*providers})
                )
                for name, profile in self.profiles.items()
            }
        )

    def with_prices(self, prices: Mapping[str, tuple[DevicePrice, ...]]) -> Catalog:
        """With these instead of the known prices. Raises UsageError for a device that is not in the catalog."""
        changed = dict(self.profiles)
        for name, own in prices.items():
            profile = self.find(name)
            changed[profile.name] = replace(profile, prices=own)
        return Catalog(changed)


@cache
def load_catalog() -> Catalog:
    """The project's own."""
    folder = files("powerband.spec.hardware") / "devices"
    entries = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".yaml")), key=lambda e: e.name)
    profiles = [
        DeviceProfile.from_dict(parse_table(entry.read_bytes(), entry.name, "device"), entry.name) for entry in entries
    ]
    return Catalog({profile.name: profile for profile in profiles})


def local_profile_path(threads: int | None = None) -> Path:
    """The file with this machine's profile for engines with so many CPU threads; None: with all cores. It is
    $POWERBAND_DEVICE_PROFILE, else in the cache, one file for each number of threads.
    """
    if named := os.environ.get("POWERBAND_DEVICE_PROFILE"):
        return Path(named)
    if named := os.environ.get("POWERBAND_HERE"):
        warn_renamed("$POWERBAND_HERE", "$POWERBAND_DEVICE_PROFILE")
        return Path(named)
    folder = cache_directory() / "profiles"
    if threads is not None and threads < detect_cpu().cores:
        return folder / f"local-{threads}-threads.yaml"
    written_before = folder / "here.yaml"  # by version 0.1
    return written_before if written_before.exists() and not (folder / "local.yaml").exists() else folder / "local.yaml"


def read_local_profile(replicas: int | None = None) -> DeviceProfile:
    """This machine's profile: of as many threads as each of `replicas` has when they share the cores; None: of the most
    that were measured. Raises EnvironmentFault if there is none, or if another machine was measured.
    """
    found = local_profiles()
    if not found:
        path = local_profile_path()
        if not path.exists():
            raise _not_measured("This machine has not been measured yet.", replicas)
        machine = _machine_name(read_profile(path))
        raise _not_measured(f"{path} was measured on another machine ({machine}).", replicas)
    if replicas is None or found[0].kind != "cpu":
        return found[0]
    cores = detect_cpu().cores
    room = cores // replicas
    for profile in found:
        if profile.threads <= room:
            return profile
    if not room:
        raise UsageError(
            f"{count_text(replicas, 'replica')} on {count_text(cores, 'core')}.",
            hint="At most one a core.",
            param="replicas",
        )
    measured = " and ".join(str(profile.threads) for profile in found)
    raise _not_measured(
        f"This machine was measured with {measured} threads; {count_text(replicas, 'replica')} on its "
        f"{count_text(cores, 'core')} have {room} each.",
        replicas,
    )


def needed_threads(replicas: int | None) -> int | None:
    """CPU threads of each of so many replicas that share this machine's cores; None: all."""
    return None if replicas in (None, 1) else max(detect_cpu().cores // (replicas or 1), 1)


def _not_measured(message: str, replicas: int | None) -> EnvironmentFault:
    threads = needed_threads(replicas)
    command = "powerband calibrate" if threads is None else f"powerband calibrate --threads {threads}"
    return EnvironmentFault(
        message, hint=f"Measure it, in two minutes on a CPU: {command}", code=NOT_MEASURED, param="devices"
    )


def local_profiles() -> list[DeviceProfile]:
    """What was measured on this machine, by its number of threads, the most first. Raises as read_profile."""
    usual = local_profile_path()
    found = {}
    for path in (usual, *sorted(usual.parent.glob("local-*-threads.yaml"))):
        profile = local_profile(path)
        if profile is not None:
            found[profile.threads] = profile
    return [found[threads] for threads in sorted(found, reverse=True)]


def local_profile(path: Path | None = None) -> DeviceProfile | None:
    """This machine's profile; None: not calibrated. path: of another file than usual. Raises as read_profile."""
    if path is None:
        return next(iter(local_profiles()), None)
    profile = read_profile(path) if path.exists() else None
    return profile if profile is not None and is_local(profile) else None


def check_profile_can_be_written(path: Path) -> None:
    """Before minutes of measuring. Raises EnvironmentFault."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as problem:
        raise _cannot_write(path, problem) from None


def write_profile(profile: DeviceProfile, path: Path) -> None:
    """All or nothing. Raises EnvironmentFault."""
    import yaml

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, yaml.safe_dump(profile.as_dict(), sort_keys=False, allow_unicode=True).encode())
    except OSError as problem:
        raise _cannot_write(path, problem) from None


def _cannot_write(path: Path, problem: OSError) -> EnvironmentFault:
    hint = f"{WRITABLE_CACHE} Or name another file with --out."
    return EnvironmentFault(f"Cannot write {path}: {problem.strerror}.", hint=hint, param="out")


def is_local(profile: DeviceProfile) -> bool:
    """Whether a profile of a CPU was measured on this processor; True if it does not say. GPUs: compare names."""
    if profile.machine is None or profile.kind != "cpu":
        return True
    cpu = detect_cpu()
    return (profile.machine.name, profile.machine.cores) == (cpu.name, cpu.cores)


def _machine_name(profile: DeviceProfile) -> str:
    return f"{profile.machine.name}, {profile.machine.cores} cores" if profile.machine is not None else profile.name


def read_profile(path: Path) -> DeviceProfile:
    """Raises EnvironmentFault if the file cannot be read, UsageError if it is not a valid profile."""
    profile = DeviceProfile.from_dict(read_table(path, "device", max_bytes=_MAX_BYTES, param="devices"), str(path))
    return replace(profile, name=LOCAL) if profile.name == OLD_LOCAL else profile


def read_prices(path: Path) -> dict[str, tuple[DevicePrice, ...]]:
    """A file of `DEVICE: dollars per hour`, or `DEVICE: [{usd_per_hour: 4.6, devices: 4, where: our contract}]`.

    Raises EnvironmentFault when it cannot be read, UsageError for an invalid price.
    """
    return {
        str(name): tuple(_price(item, str(name), path) for item in (given if isinstance(given, list) else [given]))
        for name, given in read_table(path, "list of prices", param="devices").items()
    }


def _price(given: Any, name: str, path: Path) -> DevicePrice:
    values = given if isinstance(given, dict) else {"usd_per_hour": given}
    common = {"where": path.name, "source": str(path), "confidence": "user"}
    price = read_record(DevicePrice, {**common, **values}, f"{path}: {name}")
    if not price.usd_per_hour or not price.devices:
        raise UsageError(
            f"{path}: {shown(given)} is not a valid price of {name}.", hint="Dollars and devices are above 0."
        )
    return price


def usd_per_hour(
    prices: Iterable[DevicePrice], replicas: int, devices_each: int
) -> tuple[float, dict[str, int]] | None:
    """The cheapest machines for `replicas` of `devices_each` devices: (dollars per hour, machines by name).

    A replica lies on one machine; a machine holds as many as fit. Where no listed machine is large enough, the price
    of a smaller one counts as a price per device: a replica of four costs as much as four machines of one device. None:
    no price is known. Prices of low confidence count only where there are no others; a user's go before all.
    """
    known = list(prices)
    usable = _best_known([price for price in known if price.devices >= devices_each]) or _best_known(known)
    machines = [_joined(price, devices_each) for price in usable]
    return _cheapest(machines, replicas, devices_each) if machines else None


def _best_known(prices: list[DevicePrice]) -> list[DevicePrice]:
    for trusted in ({"user"}, {"high", "medium"}, {"low"}):
        if known := [price for price in prices if price.confidence in trusted]:
            return known
    return []


class _Machine(NamedTuple):
    """Machines of one kind that are rented together."""

    where: str
    number: int
    devices: int  # of all of them
    usd_per_hour: float  # of all of them


def _joined(price: DevicePrice, devices: int) -> _Machine:
    """As many machines as together have so many devices."""
    count = -(-devices // price.devices)
    return _Machine(price.where, count, price.devices * count, price.usd_per_hour * count)


def _cheapest(machines: list[_Machine], replicas: int, devices_each: int) -> tuple[float, dict[str, int]]:
    """Machines that hold at least `replicas`: the unbounded knapsack by dynamic programming."""
    best: list[tuple[float, dict[str, int]]] = [(0.0, {})]
    for wanted in range(1, replicas + 1):
        choices = []
        for one in machines:
            rest, rented = best[max(wanted - one.devices // devices_each, 0)]
            choices.append((rest + one.usd_per_hour, {**rented, one.where: rented.get(one.where, 0) + one.number}))
        best.append(min(choices, key=lambda choice: choice[0]))
    return best[replicas]
