"""The monitor's state: the target of the service, its observations, and what it derives from them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from powerband.fleet.monitor.recent_traffic import RecentTraffic, RequestSample
from powerband.fleet.monitor.replica_metrics import ReplicaMetrics, read_metrics
from powerband.fleet.monitor.residuals import StepResiduals
from powerband.fleet.monitor.slo_burn import SLOBurn
from powerband.gateway.observability.slo import slo_violations
from powerband.gateway.request import CompletedRequest
from powerband.gateway.snapshot import PoolSnapshot, ReplicaSnapshot
from powerband.spec.hardware.device import usable_memory
from powerband.spec.plan import Prediction
from powerband.spec.slo import SLO

RECENT_S = 30.0
_BASELINE_TIME_CONSTANT_S = 600.0
_MIN_SAMPLES = 5
_BASELINE_FIGURES = ("prompt_tokens", "output_tokens", "cached_share", "tpot_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class SLOTarget:
    """The target of a service: the guarantee of its plan, or only an SLO."""

    slo: SLO
    rate: float | None = None  # requests per second up to which the plan guarantees the SLO; None: there is no plan
    predicted: Mapping[str, Prediction] = field(default_factory=dict)  # as in a Plan

    @property
    def band(self) -> float:
        """ln(high / value) of the predicted time per output token: the guarantee holds at its slow edge."""
        tpot = self.predicted.get("tpot_mean_s") or self.predicted.get("tpot_s")
        return math.log(tpot.high / tpot.value) if tpot is not None and 0 < tpot.value < tpot.high else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLoad:
    load: float  # average of the last minute
    cores: int
    # Pressure stall information of the last 10 s; None: the system does not report it.
    cpu_pressure: float | None = None  # fraction of the time in which some task waited for a core
    memory_pressure: float | None = None  # fraction of the time in which all tasks waited for memory
    memory_bytes: int = 0
    available_memory_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One observation of the service, about once a second."""

    now_s: float  # time.time()
    clock_s: float  # time.monotonic(), which the windows use
    completed: tuple[CompletedRequest, ...] = ()  # requests, since the last observation
    crashes: tuple[str, ...] = ()  # of replicas and the gateway, since the last observation, a sentence each
    pools: tuple[PoolSnapshot, ...] | None = ()  # None: the gateway does not respond
    metrics: Mapping[str, str] = field(default_factory=dict)  # /metrics of the replicas that responded, by id
    host: HostLoad | None = None


@dataclass(slots=True)
class MonitorState:
    """Times on the clock of the observations. Dictionaries are by replica id, except `baseline`."""

    target: SLOTarget
    burn: SLOBurn
    residuals: StepResiduals
    traffic: RecentTraffic = field(default_factory=RecentTraffic)
    clock_s: float = 0.0
    pools: tuple[PoolSnapshot, ...] = ()
    host: HostLoad | None = None
    metrics: dict[str, ReplicaMetrics] = field(default_factory=dict)
    baseline: dict[str, float] = field(default_factory=dict)  # by figure: the average while there are no incidents
    progress: dict[str, tuple[float, float]] = field(default_factory=dict)  # work done, and when that last grew
    idle_since_s: dict[str, float] = field(default_factory=dict)  # of replicas without requests
    ejected_since_s: dict[str, float] = field(default_factory=dict)  # of replicas to which the gateway sends nothing
    gateway_down_since_s: float | None = None

    @classmethod
    def for_target(cls, target: SLOTarget) -> MonitorState:
        return cls(target, SLOBurn(target.slo), StepResiduals(target.band))

    @property
    def replicas(self) -> tuple[ReplicaSnapshot, ...]:
        return tuple(replica for pool in self.pools for replica in pool.replicas)

    @property
    def num_ready(self) -> int:
        return sum(replica.state == "ready" for replica in self.replicas)

    def observe(self, observation: Observation) -> None:
        self.clock_s = now = observation.clock_s
        self.host = observation.host
        if observation.pools is None:
            self.gateway_down_since_s = now if self.gateway_down_since_s is None else self.gateway_down_since_s
        else:
            self.gateway_down_since_s = None
            self.pools = observation.pools
        self.traffic.add(self._count(observation), self.pools, now)
        self.metrics = {replica: read_metrics(text) for replica, text in observation.metrics.items()}
        for replica, metrics in self.metrics.items():
            self.residuals.add_metrics(replica, metrics)
        present = [replica.id for replica in self.replicas]
        self.residuals.update(now, present)
        self._track_replicas(present)

    def update_baseline(self, elapsed_s: float) -> None:
        """Update the baseline. Call it only while there are no incidents."""
        recent = self.traffic.figures(self.clock_s, RECENT_S)
        if recent["answered"] < _MIN_SAMPLES:
            return
        weight = 1 - math.exp(-elapsed_s / _BASELINE_TIME_CONSTANT_S)
        for name in _BASELINE_FIGURES:
            if name in recent:
                before = self.baseline.get(name, recent[name])
                self.baseline[name] = before + weight * (recent[name] - before)

    def arrival_rate(self, window_s: float = RECENT_S) -> float | None:
        """Requests per second; None before the first observation."""
        count, seconds = self.traffic.arrivals(self.clock_s, window_s)
        return count / seconds if seconds > 0 else None

    def _count(self, observation: Observation) -> list[RequestSample]:
        """Count the completed requests against the SLO, and sample them."""
        samples = []
        for completed in observation.completed:
            time_s = self.clock_s - max(observation.now_s - completed.ended_at, 0.0)
            misses = slo_violations(completed, self.target.slo)
            if misses is not None:
                self.burn.add(time_s, misses)
            sample = RequestSample.from_completed(completed, time_s)
            samples.append(sample)
            if sample.is_single_replica and sample.tpot_s is not None:
                self.residuals.add_response(sample.replica, sample.tpot_s)
        return samples

    def _track_replicas(self, present: list[str]) -> None:
        now = self.clock_s
        for table in (self.progress, self.idle_since_s, self.ejected_since_s):
            for gone in [one for one in table if one not in present]:
                del table[gone]
        for replica in self.replicas:
            metrics = self.metrics.get(replica.id)
            done = None
            if metrics is not None and metrics.processed_tokens is not None:
                done = metrics.processed_tokens + sum(metrics.step_residuals.values())
            before = self.progress.get(replica.id)
            if before is None or (done is not None and done != before[0]):
                self.progress[replica.id] = (done or 0.0, now)
            is_idle = (
                metrics is not None
                and not replica.inflight
                and not any(metrics.values.get(name, 0.0) for name in ("running", "waiting"))
            )
            _set_since(self.idle_since_s, replica.id, is_idle, now)
            _set_since(self.ejected_since_s, replica.id, replica.state in ("ejected", "open"), now)


def read_host_load(root: Path = Path("/")) -> HostLoad | None:
    """None: the system reports no load. root: the folder with proc/ and sys/."""
    try:
        load = float((root / "proc/loadavg").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    memory_bytes, available_bytes = usable_memory(root)
    return HostLoad(
        load=load,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cpu_pressure=_pressure(root / "proc/pressure/cpu", "some"),
        memory_pressure=_pressure(root / "proc/pressure/memory", "full"),
        memory_bytes=memory_bytes,
        available_memory_bytes=available_bytes,
    )


def _pressure(path: Path, kind: str) -> float | None:
    """Parse lines like 'some avg10=1.23 avg60=…', in percent."""
    try:
        for line in path.read_text().splitlines():
            words = line.split()
            if words and words[0] == kind:
                return float(dict(word.split("=", 1) for word in words[1:])["avg10"]) / 100
    except (OSError, ValueError, KeyError):
        pass
    return None


def _set_since(times_s: dict[str, float], id: str, is_so: bool, now_s: float) -> None:
    """Record when a condition began; remove the record when it ends."""
    if is_so:
        times_s.setdefault(id, now_s)
    else:
        times_s.pop(id, None)
