"""What only the command line asks of a machine: is there a GPU, and how fast is memory."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from powerband.spec.settings import EngineSettings

GPU_NODES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def compute_device(settings: EngineSettings) -> str:
    """'cpu' or 'cuda': where an engine with these settings would run. Loads torch only where there is a GPU."""
    if settings.device != "auto":
        return settings.device
    if not has_gpu_nodes():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def has_gpu_nodes() -> bool:
    """Whether the system shows a GPU's device file (NVIDIA, AMD, or either under WSL)."""
    return any(Path(node).exists() for node in GPU_NODES)


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
