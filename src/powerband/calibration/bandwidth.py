"""How fast this machine's memory is read."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor


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
