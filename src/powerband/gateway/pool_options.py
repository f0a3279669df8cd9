"""How a pool dispatches requests and probes its replicas."""

from __future__ import annotations

from dataclasses import dataclass

from powerband.dispatch.options import DispatchOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions(DispatchOptions):
    """Also how replicas are probed. Times in seconds."""

    probe_interval_s: float = 0.5
    probe_timeout_s: float = 1.0
