"""What is known at one look, gathered for those who judge it: replica_signs.py and service_signs.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from powerband.fleet.monitor.expected import Expectation
from powerband.fleet.monitor.observation import HostLoad, Observation
from powerband.fleet.monitor.recent_traffic import RecentTraffic, RequestSample
from powerband.fleet.monitor.replica_metrics import ReplicaFigures, read_figures
from powerband.fleet.monitor.residuals import StepResiduals
from powerband.fleet.monitor.slo_burn import SLOBurn
from powerband.gateway.promise import verdict
from powerband.gateway.snapshot import PoolSnapshot, ReplicaSnapshot

RECENT_S = 30.0
_CALM_S = 600.0  # over which what is usual is averaged
_FEWEST = 5
_USUAL = ("prompt_tokens", "output_tokens", "cached_share", "tpot_s")


@dataclass(slots=True)
class MonitorState:
    """State of the watcher. usual: means over calm times. progress: by replica, what it has done and since when it has
    not gone on; idle_s, away_s: since when it has nothing to do, or gets nothing.
    """

    expected: Expectation
    attainment: SLOBurn
    residuals: StepResiduals
    lately: RecentTraffic = field(default_factory=RecentTraffic)
    clock_s: float = 0.0
    pools: tuple[PoolSnapshot, ...] = ()
    host: HostLoad | None = None
    figures: dict[str, ReplicaFigures] = field(default_factory=dict)
    usual: dict[str, float] = field(default_factory=dict)
    progress: dict[str, tuple[float, float]] = field(default_factory=dict)
    idle_s: dict[str, float] = field(default_factory=dict)
    away_s: dict[str, float] = field(default_factory=dict)
    gateway_away_s: float | None = None

    @classmethod
    def of(cls, expected: Expectation) -> MonitorState:
        return cls(expected, SLOBurn(expected.slo), StepResiduals(expected.band))

    @property
    def replicas(self) -> tuple[ReplicaSnapshot, ...]:
        return tuple(replica for pool in self.pools for replica in pool.replicas)

    @property
    def ready(self) -> int:
        return sum(replica.state == "ready" for replica in self.replicas)

    def see(self, seen: Observation) -> None:
        self.clock_s = now = seen.clock_s
        self.host = seen.host
        if seen.pools is None:
            self.gateway_away_s = now if self.gateway_away_s is None else self.gateway_away_s
        else:
            self.gateway_away_s = None
            self.pools = seen.pools
        requests = []
        for finished in seen.finished:
            time_s = now - max(seen.now_s - finished.ended_at, 0.0)
            misses = verdict(finished, self.expected.slo)
            if misses is not None:
                self.attainment.add(time_s, misses)
            requests.append(RequestSample.of(finished, time_s))
            if requests[-1].alone and requests[-1].tpot_s is not None:
                self.residuals.see_answer(requests[-1].replica, requests[-1].tpot_s)
        self.lately.add(requests, self.pools, now)
        self.figures = {replica: read_figures(text) for replica, text in seen.metrics.items()}
        for replica, figures in self.figures.items():
            self.residuals.see_metrics(replica, figures)
        present = [replica.id for replica in self.replicas]
        self.residuals.look(now, present)
        self._follow(present)

    def learn(self, elapsed_s: float) -> None:
        """What is usual, in calm times."""
        told = self.lately.figures(self.clock_s, RECENT_S)
        if told["answered"] < _FEWEST:
            return
        share = 1 - math.exp(-elapsed_s / _CALM_S)
        for name in _USUAL:
            if name in told:
                before = self.usual.get(name, told[name])
                self.usual[name] = before + share * (told[name] - before)

    def rate(self, window_s: float = RECENT_S) -> float | None:
        """Requests a second that come."""
        count, seconds = self.lately.arrivals(self.clock_s, window_s)
        return count / seconds if seconds > 0 else None

    def _follow(self, present: list[str]) -> None:
        now = self.clock_s
        for known in (self.progress, self.idle_s, self.away_s):
            for gone in [one for one in known if one not in present]:
                del known[gone]
        for replica in self.replicas:
            figures = self.figures.get(replica.id)
            done = None
            if figures is not None and figures.tokens is not None:
                done = figures.tokens + sum(figures.residuals.values())
            before = self.progress.get(replica.id)
            if before is None or (done is not None and done != before[0]):
                self.progress[replica.id] = (done or 0.0, now)
            is_idle = (
                figures is not None
                and not replica.inflight
                and not any(figures.values.get(name, 0.0) for name in ("running", "waiting"))
            )
            _since(self.idle_s, replica.id, is_idle, now)
            _since(self.away_s, replica.id, replica.state in ("ejected", "open"), now)


def _since(times_s: dict[str, float], name: str, holds: bool, now_s: float) -> None:
    if holds:
        times_s.setdefault(name, now_s)
    else:
        times_s.pop(name, None)
