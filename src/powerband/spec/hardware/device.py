"""What a device is, and what this machine's CPU is: read from /proc, /sys and the operating system, without torch."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

# What CPU kernels choose by, under the names that Linux prints in /proc/cpuinfo (x86 and Arm).
CPU_FEATURES = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512dq"),
    *("avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8", "asimd", "asimddp", "sve", "sve2", "bf16", "i8mm"),
)


GPU_NODES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


@dataclass(frozen=True, slots=True)
class Device:
    """One processor with its memory: what a plan needs to know of it. None or absent: not known."""

    name: str
    kind: Literal["cpu", "cuda"]
    memory_bytes: int  # that this process may use at most: all of it, or the container's limit
    available_memory_bytes: int  # of it, free now
    cores: int  # physical cores (CPU) or multiprocessors (CUDA) that this process may use
    features: tuple[str, ...] = ()
    peak_flops_per_s: Mapping[str, float] = field(default_factory=dict)  # by dtype


def detect_cpu(root: Path = Path("/"), affinity: Collection[int] | None = None) -> Device:
    """The CPU of this machine, as far as this process may use it.

    Honours the CPUs it is bound to and the memory and CPU limits of its control groups (version 1 or 2).
    `root`: where /proc and /sys lie. `affinity`: ids of the logical CPUs; default: those of this process.
    """
    cpus = set(affinity) if affinity is not None else _affinity()
    processors = _processors(root)
    total, available = usable_memory(root)
    first = processors[0] if processors else {}
    present = set((first.get("flags") or first.get("Features") or "").split())
    return Device(
        name=first.get("model name") or platform.processor() or platform.machine() or "CPU",
        kind="cpu",
        memory_bytes=total,
        available_memory_bytes=available,
        cores=_usable_cores(processors, cpus, _cpu_quota(root)),
        features=tuple(name for name in CPU_FEATURES if name in present),
    )


def usable_memory(root: Path = Path("/")) -> tuple[int, int]:
    """(total, available) in bytes: of the machine, or of this process's control groups where they allow less."""
    total, available = _host_memory(root)
    for limit, used in _memory_limits(root):
        total = min(total, limit)
        available = min(available, max(limit - used, 0))
    return total, min(available, total)


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _processors(root: Path) -> list[dict[str, str]]:
    """One table of /proc/cpuinfo for each logical CPU."""
    processors = []
    for paragraph in _text(root / "proc/cpuinfo").strip().split("\n\n"):
        pairs = (line.partition(":") for line in paragraph.splitlines())
        table = {key.strip(): value.strip() for key, _, value in pairs}
        if "processor" in table:
            processors.append(table)
    return processors


def _usable_cores(processors: list[dict[str, str]], cpus: set[int], quota: float | None) -> int:
    """Distinct physical cores among `cpus`, at most the quota. If cores cannot be distinguished, every CPU counts."""
    cores = {
        (table.get("physical id", ""), table.get("core id", table["processor"]))
        for table in processors
        if table["processor"].isdigit() and int(table["processor"]) in cpus
    }
    count = len(cores) or len(cpus)
    return max(1, min(count, math.ceil(quota)) if quota is not None else count)


def _host_memory(root: Path) -> tuple[int, int]:
    """(total, available) in bytes."""
    table = {}
    for line in _text(root / "proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        if value.split()[:1] and value.split()[0].isdigit():
            table[key] = int(value.split()[0]) * 1024
    if "MemTotal" not in table:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    return table["MemTotal"], table.get("MemAvailable", table["MemTotal"])


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of every control group around this process. Cached files do not count as used."""
    for group in _groups(root, "memory"):
        for limit, used, reclaimable in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            value = _text(group / limit).strip()
            if value.isdigit():
                in_use = _text(group / used).strip()
                cached = _stat(group / "memory.stat").get(reclaimable, 0)
                yield int(value), max(int(in_use) - cached, 0) if in_use.isdigit() else 0


def _cpu_quota(root: Path) -> float | None:
    """CPUs' worth of time that control groups allow; None: no limit."""
    quotas = []
    for group in _groups(root, "cpu"):
        quota, _, period = _text(group / "cpu.max").strip().partition(" ")
        if not quota:
            quota, period = (_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups around this process, innermost first, for version 2 and for version 1."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controller
        else:
            continue
        # Inside a container the path may be the host's, and only the mount's root is there: walk up to it.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield mount.joinpath(*parts[:depth])


def _stat(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _text(path: Path) -> str:
    """The file's text; empty where this system has no such file."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def has_gpu_nodes() -> bool:
    """Whether the system shows a GPU's device file (NVIDIA, AMD, or either under WSL)."""
    return any(Path(node).exists() for node in GPU_NODES)
