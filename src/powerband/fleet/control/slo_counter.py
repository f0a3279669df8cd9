"""Counts completed requests against the SLO since the service was deployed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from powerband.fleet.service.status import ServiceLoad
from powerband.gateway.observability.slo import slo_violations
from powerband.gateway.request import CompletedRequest
from powerband.spec.slo import SLO


@dataclass(slots=True)
class SLOCounter:
    scheduled: int = 0
    good: int = 0
    since: float = 0.0  # time.time()

    def resume(self, load: ServiceLoad) -> None:
        """Continue the counts of the previous controller."""
        self.scheduled, self.good, self.since = load.scheduled, load.good, load.since

    def count(self, completed: Sequence[CompletedRequest], slo: SLO) -> None:
        """gateway.promise decides which requests count, and which meet the SLO."""
        self.since = self.since or time.time()
        verdicts = [missed for one in completed if (missed := slo_violations(one, slo)) is not None]
        self.scheduled += len(verdicts)
        self.good += sum(not missed for missed in verdicts)

    def load(self, *, requests_per_s: float, running: int, queued: int, next_record: int) -> ServiceLoad:
        return ServiceLoad(
            requests_per_s=requests_per_s,
            running=running,
            queued=queued,
            scheduled=self.scheduled,
            good=self.good,
            since=self.since,
            next_record=next_record,
        )
