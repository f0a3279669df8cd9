"""What others watch by, beside the watcher: rules and statistics on raw figures, as published or as is usual.

enova rule        50 requests wait in each of the last three minutes (ENOVA's public detector, scale-up)
TTFT over SLO     the mean TTFT of ten seconds is over the SLO's limit
3 sigma           any raw figure of ten seconds is three standard deviations from its mean in the first calm minutes:
                  of a replica TPOT, requests in hand, KV cache in use, requests failed; of all TTFT and queue

They need not say why: an alarm is right when it names the replica, or comes at all for a fault of the whole service.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean, median, pstdev

from powerband.fleet.monitor.replica_metrics import read_metrics
from powerband.fleet.monitor.state import Observation

WINDOW_S, CLOSE_S = 10.0, 30.0
SERVICE = "service"


@dataclass(slots=True)
class Alarms:
    """Which subjects are in alarm, and every (subject, second) at which one began."""

    begun: list[tuple[str, float]] = field(default_factory=list)
    _seen_s: dict[str, float] = field(default_factory=dict)

    def note(self, subjects: set[str], now_s: float) -> None:
        for subject in subjects:
            if subject not in self._seen_s:
                self.begun.append((subject, now_s))
            self._seen_s[subject] = now_s
        self._seen_s = {one: seen_s for one, seen_s in self._seen_s.items() if now_s - seen_s < CLOSE_S}


class Peer:
    """Gathers windows; `judge` looks at each: figures by (subject, name)."""

    def __init__(self, judge: Callable[[dict[tuple[str, str], float], float], set[str]]) -> None:
        self.alarms = Alarms()
        self._judge = judge
        self._values: dict[tuple[str, str], list[float]] = {}
        self._window_s = 0.0

    def observe(self, seen: Observation) -> None:
        for one in seen.completed:
            if one.record.ttft_s is not None:
                self._add(SERVICE, "ttft", one.record.ttft_s)
            if one.record.tpot_s is not None and len(one.replicas) == 1:
                self._add(one.replicas[0], "tpot", one.record.tpot_s)
            for replica, _ in one.failed:
                self._add(replica, "failed", 1.0)
        for pool in seen.pools or ():
            self._add(SERVICE, "queued", pool.queued)
            for replica in pool.replicas:
                self._add(replica.id, "inflight", replica.inflight)
        for replica, text in seen.metrics.items():
            self._add(replica, "kv", read_metrics(text).values.get("kv_usage", 0.0))
        if seen.clock_s - self._window_s >= WINDOW_S:
            self._window_s = seen.clock_s
            figures = {key: (sum if key[1] == "failed" else fmean)(values) for key, values in self._values.items()}
            self._values = {}
            self.alarms.note(self._judge(figures, seen.clock_s), seen.clock_s)

    def _add(self, subject: str, name: str, value: float) -> None:
        self._values.setdefault((subject, name), []).append(value)


def enova_rule() -> Peer:
    minutes: list[float] = []

    def judge(figures: dict[tuple[str, str], float], _now_s: float) -> set[str]:
        minutes.append(figures.get((SERVICE, "queued"), 0.0))
        last = [median(minutes[-6 * n : len(minutes) - 6 * (n - 1)] or [0.0]) for n in (1, 2, 3)]
        return {SERVICE} if len(minutes) >= 18 and min(last) >= 50 else set()

    return Peer(judge)


def ttft_over_slo(limit_s: float) -> Peer:
    return Peer(lambda figures, _: {SERVICE} if figures.get((SERVICE, "ttft"), 0.0) > limit_s else set())


def three_sigma(train_s: float) -> Peer:
    known: dict[str, list[float]] = {}

    def judge(figures: dict[tuple[str, str], float], now_s: float) -> set[str]:
        if now_s < train_s:
            for (_, name), value in figures.items():
                known.setdefault(name, []).append(value)
            return set()
        found = set()
        for (subject, name), value in figures.items():
            calm = known.get(name, [0.0, 0.0])
            if abs(value - fmean(calm)) > 3 * max(pstdev(calm), 1e-6):
                found.add(subject)
        return found

    return Peer(judge)
