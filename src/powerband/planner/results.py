"""What planning finds out about a deployment, and in all. Plain values; how they are shown is elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from powerband.planner.rate_curves import RateCurve
from powerband.spec.deployment import Deployment
from powerband.spec.plan import Prediction as Prediction
from powerband.spec.slo import SLO

Bound = Literal["memory", "bandwidth", "compute", "link", "host", "queueing"]
Objective = Literal["cost", "latency", "throughput"]


@dataclass(frozen=True, slots=True)
class SimulatedRate:
    """A simulation at the band's slow edge. kept_limits: the least limits of (TTFT, TPOT) that enough of its requests
    keep, which also keep the other limits of the SLO: where one is wider, the other may be narrower. Empty: none are.
    """

    rate: float
    kept_limits: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A deployment under the workload at the asked rate. Figures by name, each at the SLO's percentile and the mean.

    figures: 'ttft_s', 'tpot_s', 'e2e_s' at the attainment's percentile; 'ttft_mean_s', 'tpot_mean_s', 'e2e_mean_s';
    'attainment' (share of requests that meet the SLO), 'output_tokens_per_s', 'capacity' (requests a second up to which
    the SLO is kept, pessimistic edge in `low`).
    """

    deployment: Deployment
    method: Literal["closed form", "simulation"]
    figures: Mapping[str, Prediction]
    meets_slo: bool  # at the pessimistic edge of its bands
    usd_per_hour: float | None  # None: no price is known
    machines: Mapping[str, int] = field(default_factory=dict)  # that this price is of: how many of each, by name
    binds: Bound
    operators: Mapping[str, float]  # share of a replica's busy time by operator, the largest first
    kv_tokens: int  # of one replica (of the last pool)
    weights_bytes: int  # of one rank
    dominated: bool = False
    notes: tuple[str, ...] = ()
    simulated: tuple[SimulatedRate, ...] = ()
    curve: RateCurve | None = None  # at other rates and in other numbers; None: of several kinds of replicas
    corrections: Mapping[str, float] = field(default_factory=dict)  # factors on the curve's figures, by name

    @property
    def usd_per_million_tokens(self) -> float | None:
        """Dollars per million output tokens at the asked rate."""
        tokens = self.figures["output_tokens_per_s"].value * 3600
        return None if self.usd_per_hour is None or tokens <= 0 else self.usd_per_hour / tokens * 1e6


@dataclass(frozen=True, slots=True)
class Pruned:
    """Deployments that cannot be, with the reason: 'does not fit: needs 31.2 GB, has 22.1 GB'."""

    what: str
    reason: str
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanResults:
    """What a search found. `evaluations`: all that can be, the best first; the frontier is what is not dominated."""

    model: str
    objective: Objective
    rate: float
    slo: SLO
    workload: Mapping[str, Any]
    evaluations: tuple[Evaluation, ...]
    pruned: tuple[Pruned, ...]
    recommended: Evaluation | None  # None: nothing meets the SLO within the budget
    budget_usd_per_hour: float | None = None
    price_origins: Mapping[str, str] = field(default_factory=dict)  # of machines by name: 'list price; 2025'
    reasons: tuple[str, ...] = ()  # why this one: sentences
    cut: str = ""  # what of the requests was cut to fit the model's context, in a sentence
    alternatives: Mapping[str, Evaluation] = field(default_factory=dict)  # 'cheaper', 'faster', 'nearest'
    seconds: float = 0.0

    @property
    def frontier(self) -> tuple[Evaluation, ...]:
        return tuple(evaluation for evaluation in self.evaluations if not evaluation.dominated)

    @property
    def unit(self) -> str:
        """Of its rates: where requests come in conversations, it is these that arrive."""
        requests = self.workload.get("requests", {})
        return "conversations/s" if requests.get("conversation") else "requests/s"
