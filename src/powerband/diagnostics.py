"""What this machine has, what Powerband would use of it and why, and what is missing."""

from __future__ import annotations

import contextlib
import platform
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from powerband.calibration.bandwidth import read_bandwidth_bytes_per_s
from powerband.cost.sizing import readable
from powerband.engine.kernels.cpu import library
from powerband.errors import PowerbandError
from powerband.extras import WITHOUT_TORCH, is_installed, pip_command
from powerband.spec.hardware.catalog import read_local_profile
from powerband.spec.hardware.device import detect_cpu, has_gpu_nodes
from powerband.spec.quantities import count_text


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is missing or slower than it need be. With a fatal one no command works."""

    problem: str
    remedy: str
    fatal: bool = False


def package_versions() -> dict[str, str | None]:
    """Installed version of each package that Powerband always needs, and of torch; None: not installed."""
    found: dict[str, str | None] = {}
    for requirement in requires("powerband") or ():
        name = re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0]
        if "extra ==" not in requirement or name == "torch":
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = None
    return found


def missing_packages(versions: dict[str, str | None]) -> list[Problem]:
    """A finding for each package that is not installed: fatal, unless only some commands need it."""
    found = [
        Problem(f"The package {name} is not installed.", f"pip install {name}", fatal=True)
        for name, version in versions.items()
        if version is None and name != "torch"
    ]
    if versions.get("torch") is None:
        found.append(Problem(f"torch is not installed; it is needed for {WITHOUT_TORCH}.", pip_command("torch")))
    elif not is_installed("scipy"):
        found.append(Problem("scipy is not installed; 'powerband calibrate' needs it.", pip_command("scipy")))
    return found


def missing_calibration() -> list[Problem]:
    """A finding if no plan can be made for this machine, since no profile of it is there."""
    try:
        read_local_profile()
    except PowerbandError as error:
        needed = "'powerband plan' without --devices and 'powerband deploy MODEL' need that."
        return [Problem(f"{error.message} {needed}", error.hint)]
    return []


def machine_report() -> dict[str, Any]:
    cpu = detect_cpu()
    return {
        "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "cpu": cpu.name,
        "cpu_features": list(cpu.features),
        "cores": cpu.cores,
        "memory_bytes": cpu.memory_bytes,
        "available_memory_bytes": cpu.available_memory_bytes,
        "read_bandwidth_bytes_per_s": read_bandwidth_bytes_per_s(cpu.cores),
        "compiler": next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None),
    }


def compute_report(findings: list[Problem]) -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    if not gpus and has_gpu_nodes():
        findings.append(
            Problem(
                f"This machine has a GPU, but torch {torch.__version__} cannot use it.",
                "Install a torch build for this GPU: https://pytorch.org/get-started/locally/",
            )
        )
    from powerband.engine.attention import choose_backend

    device = "cuda" if gpus else "cpu"
    kernels = _kernel_status(findings)
    if kernels.tier is None and not gpus:
        findings.append(
            Problem(
                f"Without C++ kernels plain torch computes, several times slower: {kernels.reason}",
                f"{kernels.remedy} The kernels are compiled at the next start.".lstrip(),
            )
        )
    attention = choose_backend("auto", device, kernels)
    return {
        "device": device,
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "attention": f"{attention.name}: {attention.reason}",
        "weight_cache": _weight_cache(),
        "cpu_kernels": f"{kernels.tier or 'none'}: {kernels.reason}",
        "torch_cpu_kernels": torch.backends.cpu.get_cpu_capability(),
        "onednn": torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]  # torch's own is untyped
    }


def _kernel_status(findings: list[Problem]) -> library.Status:
    """The kernels that the next start will have. They are not compiled here, since that takes long."""
    with contextlib.suppress(PowerbandError, OSError):  # load() returns it as the reason
        if not library.is_compiled():
            findings.append(
                Problem(
                    "The C++ kernels for this processor are not compiled yet: the first start does it, in a minute.",
                    "powerband doctor --compile",
                )
            )
            return library.Status(library.own_tier(), "not compiled yet")
    return library.load()


def _weight_cache() -> str:
    from powerband.engine.model_loader import weight_cache

    files = weight_cache.kept_files()
    size = sum(path.stat().st_size for path in files)
    return f"{weight_cache.folder()}: {count_text(len(files), 'file')}, {readable(size)}"


def words(key: str) -> str:
    """A key of a report, as people read it."""
    return key.removesuffix("_bytes_per_s").removesuffix("_bytes").replace("_", " ")


def cell(key: str, value: Any) -> str:
    """A value of a report, with its unit."""
    if value is None:
        return "not found"
    if key.endswith("_bytes_per_s"):
        return f"{value / 1e9:.1f} GB/s"
    if key.endswith("_bytes"):
        return readable(value)
    if key == "gpus":
        return ", ".join(f"{gpu['name']} ({readable(gpu['memory_bytes'])})" for gpu in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(value) or "none known" if isinstance(value, list) else str(value)
