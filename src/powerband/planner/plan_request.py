"""What is asked of a planner, and what its workload weighs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from powerband.cost.latency import LatencyModel
from powerband.planner.candidates import SearchSpace
from powerband.planner.results import Objective
from powerband.spec.deployment import EngineName, Quantization, Replica
from powerband.spec.hardware.profile import DeviceProfile
from powerband.spec.model.checkpoint_precision import CheckpointPrecision
from powerband.spec.model.model_spec import ModelSpec
from powerband.spec.slo import SLO
from powerband.spec.workload.arrivals import OpenLoop, Replay
from powerband.spec.workload.fitting import refuse_cuts
from powerband.spec.workload.schedule import Schedule
from powerband.spec.workload.workload import Workload

_SAMPLED_REQUESTS = 4000  # of which the longest counts
_DENSE_ARRIVALS = OpenLoop.at(1000.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What a planner is asked for."""

    model: str
    spec: ModelSpec
    stored: CheckpointPrecision
    profiles: Sequence[DeviceProfile]
    engines: Sequence[EngineName]
    workload: Workload
    rate: float  # requests per second
    slo: SLO
    max_model_len: int
    budget_usd_per_h: float | None = None
    max_devices: int = 8
    replicas: int | None = None  # exactly this many equal ones; None: as few as it takes
    quantizations: Sequence[Quantization] = ()  # empty: the default ones
    objective: Objective = "cost"
    draft_tokens: int = 0
    draft_acceptance: float = 0.0
    pinned: Mapping[str, Any] = field(default_factory=dict)  # fields that every Replica must have
    seed: int = 0
    pick: str | None = None  # id of the only deployment to look at, or a role among all of them

    @property
    def space(self) -> SearchSpace:
        return SearchSpace(
            profiles=self.profiles,
            engines=self.engines,
            max_devices=self.max_devices,
            max_model_len=self.max_model_len,
            quantizations=self.quantizations,
            draft_tokens=self.draft_tokens,
            draft_acceptance=self.draft_acceptance,
            pinned=self.pinned,
        )

    def profile(self, name: str) -> DeviceProfile:
        return next(profile for profile in self.profiles if profile.name == name)

    def latency_model(self, replica: Replica, engine: EngineName) -> LatencyModel:
        """Of this workload's steps. Raises UsageError for what the device cannot compute."""
        constrained = self.workload.constrains_answers
        return LatencyModel(self.spec, self.profile(replica.device), replica, engine, constrained=constrained)

    def schedule(self, rate: float, num_requests: int) -> Schedule:
        """The workload at a rate. A trace at its own times is played so much faster or slower."""
        arrivals = self.workload.arrivals
        if isinstance(arrivals, Replay):
            own = self.workload.mean_rate() or rate
            scaled = replace(self.workload, arrivals=Replay(arrivals.speedup * rate / own))
        else:
            burstiness = arrivals.burstiness if isinstance(arrivals, OpenLoop) else 1.0
            scaled = replace(self.workload, arrivals=OpenLoop.at(rate, burstiness))
        return scaled.draw(self.seed, num_requests=num_requests)


@dataclass(frozen=True, slots=True)
class RequestTokens:
    """Mean tokens of requests."""

    prompt: float
    new: float  # prompt tokens that are not in a prefix cache
    new_squared: float
    output: float
    new_high: float  # at the asked percentile
    share: float = 1.0  # of all requests
    turns: float = 1.0  # requests of one arrival

    @property
    def context(self) -> float:
        """Mean positions that a decode attends to, over its steps: prompt and half of the answer."""
        return self.prompt + self.output / 2


@dataclass(frozen=True, slots=True)
class WorkloadStats:
    """The tokens of one request."""

    prompt: int
    cached: int  # of its prompt, in an unlimited prefix cache
    output: int


def request_tokens(schedule: Schedule) -> list[WorkloadStats]:
    """Every request of a schedule, in the order of chains."""
    seen: dict[str, int] = {}
    found = []
    for chain in schedule.chains:
        history = 0
        for request in chain.requests:
            history = history if request.turn else 0
            cached, is_known = history, True
            for segment in request.segments:
                known = min(seen.get(segment.key, 0), segment.tokens) if is_known else 0
                cached += known
                is_known = is_known and known == segment.tokens
                seen[segment.key] = max(seen.get(segment.key, 0), segment.tokens)
            prompt = history + request.new_tokens
            found.append(WorkloadStats(prompt, min(cached, prompt - 1), request.output_tokens))
            history = prompt + request.output_tokens
    return found


def mean_turns(schedule: Schedule) -> float:
    """Mean requests of an arrival, which is a conversation, also one that begins again on its way."""
    return schedule.num_requests / max(len(schedule.chains), 1)


def mean_tokens(
    requests: Sequence[WorkloadStats], *, caching: bool, percentile: float, turns: float = 1.0, of: int | None = None
) -> RequestTokens:
    """Of some requests (at least one). percentile: 0 … 1, of `new_high`. of: how many there are in all."""
    count = len(requests)
    new = sorted(request.prompt - request.cached if caching else request.prompt for request in requests)
    return RequestTokens(
        prompt=sum(request.prompt for request in requests) / count,
        new=sum(new) / count,
        new_squared=sum(tokens * tokens for tokens in new) / count,
        output=sum(request.output for request in requests) / count,
        new_high=new[min(int(percentile * count), count - 1)],
        share=count / (of or count),
        turns=turns,
    )


def fit_to_context(workload: Workload, seed: int, limit: int, *, is_strict: bool = False) -> Workload:
    """The workload with the context that it needs, in `max_model_len`: that of the longest of many requests, up to
    whole thousands and to `limit`. Longer requests are cut; is_strict: UsageError instead.
    """
    fitted = replace(workload.within(limit), arrivals=_DENSE_ARRIVALS)
    drawn = fitted.draw(seed, num_requests=_SAMPLED_REQUESTS)
    if is_strict:
        refuse_cuts(drawn.cut, drawn.num_requests)
    max_tokens = max(request.prompt + request.output for request in request_tokens(drawn))
    return workload.within(min(-(-max_tokens // 1024) * 1024, limit))
