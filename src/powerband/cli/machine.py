"""What this machine is, found without torch where that is possible: processor, memory, bandwidth, GPU."""

from __future__ import annotations

import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from powerband.spec.settings import EngineSettings

GPU_NODES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
# What CPU kernels care about, by the names that Linux prints in /proc/cpuinfo (x86 and Arm).
CPU_FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni"),
    *("amx_tile", "amx_bf16", "amx_int8", "asimd", "asimddp", "sve", "sve2", "bf16", "i8mm"),
)


def device_of(settings: EngineSettings) -> str:
    """'cpu' or 'cuda': where an engine with these settings would run."""
    if settings.device != "auto":
        return settings.device
    if not has_gpu_nodes():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def has_gpu_nodes() -> bool:
    """Whether the system shows a GPU's device file (NVIDIA, AMD, or either under WSL)."""
    return any(Path(node).exists() for node in GPU_NODES)


def cpu_name() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Instruction sets of this CPU that matter for speed; empty where the system does not tell."""
    info = _cpuinfo()
    present = set((info.get("flags") or info.get("Features") or "").split())
    return [name for name in CPU_FEATURES if name in present]


def usable_cpus() -> int:
    """Logical CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> tuple[int, int | None]:
    """(total, available now) of the host; available is None where the system does not tell."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return total, None
    available = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return total, int(available) * 1024 if available else None


def read_bandwidth_bytes_per_s(threads: int, seconds: float = 0.5) -> float:
    """Measured rate at which all threads together read memory: what bounds decoding on a CPU.

    Each thread sums its own 64 MiB, larger than its share of any cache. The best pass counts, as others may be
    using the machine. numpy's sum of int64 is vectorized and releases the interpreter's lock.
    """
    import numpy

    parts = [numpy.ones(8 * 2**20, dtype=numpy.int64) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        deadline = time.perf_counter() + seconds
        while best == 0.0 or time.perf_counter() < deadline:
            start = time.perf_counter()
            list(pool.map(numpy.sum, parts))
            best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - start))
    return best


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
