"""What commands that plan share: models, devices, workloads, budgets and what-ifs as users write them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from powerband.cli.bench.options import LoadFlags, MixFlags, requested_load
from powerband.cli.model.memory import config_source
from powerband.documents import read_table
from powerband.errors import UsageError
from powerband.spec.checkpoint.precision import CheckpointPrecision, read_for_planning
from powerband.spec.deployment import ENGINES, EngineName, Quantization, Replica
from powerband.spec.hardware.catalog import Catalog, load_catalog, read_prices
from powerband.spec.hardware.profile import DevicePrice, DeviceProfile
from powerband.spec.model.config_reader import shown
from powerband.spec.model.model_spec import ModelSpec
from powerband.spec.quantities import number
from powerband.spec.settings import EngineSettings
from powerband.spec.workload.arrivals import OpenLoop
from powerband.spec.workload.presets import PRESETS
from powerband.spec.workload.workload import Workload

_SAMPLED_REQUESTS = 4000  # requests, among which the longest is looked for
_DENSE_ARRIVALS = OpenLoop.at(1000.0)
HOURS = {"h": 1.0, "hour": 1.0, "day": 24.0, "month": 730.0}


def read_model(name: str) -> tuple[ModelSpec, CheckpointPrecision]:
    """Of a Hugging Face id, a folder, a config.json, or 'demo', whichever engine could load its weights; and the
    precision that they are stored in. Raises UsageError or EnvironmentFault.
    """
    source = config_source(EngineSettings(model=name))
    return read_for_planning(source / "config.json" if source.is_dir() else source)


def chosen_devices(text: str, prices: Path | None, changes: Sequence[str]) -> list[DeviceProfile]:
    """'L4,A100' with the user's prices and changes. Raises UsageError or EnvironmentFault."""
    catalog = load_catalog()
    if prices is not None:
        catalog = catalog.with_prices(read_prices(prices))
    names = list(dict.fromkeys(name for part in text.split(",") if (name := part.strip())))
    if not names:
        raise UsageError("No device is named.", hint="Like: --devices L4,A100-80G.", param="devices")
    found = _distinct([catalog.find(name) for name in names])
    for change in changes:
        target, name, value = _change(change)
        if target != "replica":
            found = _changed(found, catalog, target, name, value)
    return found


def pinned(changes: Sequence[str]) -> dict[str, Any]:
    """Of the changes, those of a replica: settings that every candidate must have. Raises UsageError."""
    hints = get_type_hints(Replica)
    found: dict[str, Any] = {}
    for change in changes:
        target, name, value = _change(change)
        if target != "replica":
            continue
        if name not in hints or name == "device":
            known = ", ".join(item.name for item in fields(Replica) if item.name != "device")
            raise UsageError(f"A replica has no {shown(name)}.", hint=f"Known: {known}.", param="set")
        found[name] = _typed(hints[name], value, change)
    return found


def chosen_workload(requests: MixFlags, *, rate: float | None) -> tuple[Workload, float]:
    """A preset, a file of a workload (YAML) or a trace, and the rate: as told, else its own.

    Raises UsageError or EnvironmentFault.
    """
    text = requests.workload or "chat"
    path = Path(text)
    if text in PRESETS:
        if rate is None:
            raise UsageError("How many requests a second?", hint="Like: --rate 8.", param="rate")
        asked = requested_load(LoadFlags(rate=rate), requests)
        return asked.workload, rate
    if path.suffix in (".yaml", ".yml"):
        if requests != MixFlags(workload=text):
            raise UsageError(f"{text} says what requests are.", hint="Change it there, not by flags.", param="workload")
        workload = _workload_file(path)
    elif path.exists():
        workload = requested_load(LoadFlags(trace=path, rate=rate), replace(requests, workload=None)).workload
    else:
        raise UsageError(
            f"There is no workload {shown(text)}, and no such file.",
            hint=f"Presets: {', '.join(PRESETS)}; or a trace, or a workload in YAML.",
            param="workload",
        )
    own = workload.mean_rate()
    if rate is None and own is None:
        raise UsageError(f"{text} has no rate of its own.", hint="Like: --rate 8.", param="rate")
    return workload, rate if rate is not None else own or 0.0


def dollars_per_hour(text: str) -> float:
    """'4/h', '$100/day', '2900/month', or a bare number an hour. Raises UsageError."""
    match = re.fullmatch(r"\$?\s*([0-9.]+)\s*(?:/\s*([a-z]+))?", text.strip().lower())
    if match is None or (match[2] or "h") not in HOURS:
        raise UsageError(
            f"budget is '{text}', which is no price.", hint="Write it like 4/h, 100/day or 2900/month.", param="budget"
        )
    return number(match[1], param="budget") / HOURS[match[2] or "h"]


def _workload_file(path: Path) -> Workload:
    values = read_table(path, "workload", param="workload")
    if "trace" in (values.get("requests") or ()):
        raise UsageError(f"{path} names a trace.", hint="Give that: --workload TRACE.", param="workload")
    return Workload.from_dict(values)


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


def _changed(
    profiles: list[DeviceProfile], catalog: Catalog, target: str, name: str, value: str
) -> list[DeviceProfile]:
    """One fact of all devices ('device'), or of the one that is named."""
    wanted = None if target == "device" else catalog.find(target).name
    if wanted is not None and wanted not in [profile.name for profile in profiles]:
        raise UsageError(f"{wanted} is not among the devices.", hint="Name it in --devices, too.", param="set")
    return [_with(profile, name, value) if wanted in (None, profile.name) else profile for profile in profiles]


def _with(profile: DeviceProfile, name: str, value: str) -> DeviceProfile:
    if name == "price":
        dollars = number(value, param="set")
        price = DevicePrice(usd_per_hour=dollars, where="--set", source="--set", confidence="user")
        shared = DevicePrice(
            usd_per_hour=dollars * profile.devices_per_node,
            devices=profile.devices_per_node,
            where=f"--set, {profile.devices_per_node} devices",
            source="--set",
            confidence="user",
        )
        return replace(profile, prices=(price, shared))
    values = profile.as_dict()
    *tables, last = name.split(".")
    inner: Any = values
    for table in tables:
        inner = inner.setdefault(table, {}) if isinstance(inner, dict) else None
    if not isinstance(inner, dict):
        raise UsageError(f"{profile.name} has no {shown(name)}.", param="set")
    inner[last] = value
    return DeviceProfile.from_dict(values, f"--set {name}")


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


def max_request_tokens(workload: Workload, seed: int, model: ModelSpec, attainment: float) -> int:
    """Tokens, prompt and answer together, of the longest of many requests, up to whole thousands and to what the model
    knows. Raises UsageError when so many are longer than that, that the SLO cannot be kept.
    """
    from powerband.planner.plan_request import request_tokens

    drawn = replace(workload, arrivals=_DENSE_ARRIVALS).draw(seed, num_requests=_SAMPLED_REQUESTS)
    lengths = sorted(request.prompt + request.output for request in request_tokens(drawn))
    limit = model.max_position
    share = sum(length > limit for length in lengths) / len(lengths)
    if share > 1 - attainment:
        raise UsageError(
            f"{share:.0%} of the requests are longer than the {limit:,} positions that the model knows, the longest "
            f"{lengths[-1]:,} tokens: they cannot be served.",
            hint="Plan for a model with a longer context, or for shorter requests (--prompt-tokens, --turns).",
            param="workload",
        )
    return min(-(-lengths[-1] // 1024) * 1024, limit)


def quantizations(text: str) -> tuple[Quantization, ...]:
    """'none,fp8' → both; 'auto' → (): the usual ones. Raises UsageError."""
    if text == "auto":
        return ()
    names = get_args(Quantization)
    found = tuple(name for part in text.split(",") if (name := part.strip()))
    wrong = [name for name in found if name not in names]
    if wrong or not found:
        raise UsageError(
            f"There is no quantization {shown(wrong[0] if wrong else text)}.",
            hint=f"Known: auto, {', '.join(names)}.",
            param="quantization",
        )
    return found  # type: ignore[return-value] # all of them are among the names


def engines(text: str) -> tuple[EngineName, ...]:
    """'vllm,sglang' → both. Raises UsageError."""
    found = tuple(dict.fromkeys(name for part in text.split(",") if (name := part.strip())))
    wrong = [name for name in found if name not in ENGINES]
    if wrong or not found:
        raise UsageError(
            f"There is no engine {shown(wrong[0] if wrong else text)}.",
            hint=f"Known: {', '.join(ENGINES)}.",
            param="engine",
        )
    return found  # type: ignore[return-value] # all of them are among the names
