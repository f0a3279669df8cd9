"""What the watcher holds a service to: the promise of its plan, or of nothing but an SLO."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from powerband.spec.plan import Plan, Prediction
from powerband.spec.slo import SLO


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """rate: requests a second up to which the SLO is promised; None: not known. predicted: as in a Plan."""

    slo: SLO
    rate: float | None = None
    predicted: Mapping[str, Prediction] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan) -> Expectation:
        return cls(slo=plan.slo, rate=plan.promise.rate, predicted=plan.predicted)

    @property
    def band(self) -> float:
        """ln(high / value) of the predicted time per output token: the promise was made at its slow edge."""
        tpot = self.predicted.get("tpot_mean_s") or self.predicted.get("tpot_s")
        return math.log(tpot.high / tpot.value) if tpot is not None and 0 < tpot.value < tpot.high else 0.0
