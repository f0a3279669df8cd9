"""Counts completed requests against the SLO since the present plan was deployed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from powerband.fleet.service.status import ServiceLoad
from powerband.gateway.observability.slo import slo_violations
from powerband.gateway.request import CompletedRequest
from powerband.spec.slo import SLO


@dataclass(slots=True)
class SLOCounter:
    scheduled: int = 0
    good: int = 0
    since: float = 0.0  # time.time()
    plan: str = ""  # digest of the plan whose requests are counted; '': counted by a version that did not note it

    def resume(self, load: ServiceLoad) -> None:
        """Continue the counts of the previous controller."""
        self.scheduled, self.good, self.since, self.plan = load.scheduled, load.good, load.since, load.plan

    def count(self, completed: Sequence[CompletedRequest], plan: Mapping[str, Any], slo: SLO) -> None:
        """metrics.slo decides which requests count, and which meet the SLO. Another plan begins at nothing."""
        digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]
        if self.plan not in ("", digest):
            self.scheduled = self.good = 0
            self.since = 0.0
        self.plan = digest
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
            plan=self.plan,
            next_record=next_record,
        )
