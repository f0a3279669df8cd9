"""The C++ kernels for CPUs against plain torch. The tier is the machine's own, or POWERBAND_KERNEL_TIER."""

from __future__ import annotations

import pytest

from powerband.engine.kernels.cpu import library


@pytest.fixture(autouse=True, scope="session")
def kernels() -> library.Status:
    status = library.load()
    if status.tier is None:
        pytest.skip(f"no CPU kernels: {status.reason}")
    return status
