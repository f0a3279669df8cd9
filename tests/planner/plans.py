"""Small worlds for planning: models of steps that are plain enough to reckon by hand, and what runs on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from powerband.planner.simulation.simulator import Simulation, simulate
from powerband.spec.deployment import Deployment, Replica, ReplicaPool
from powerband.spec.hardware.profile import Evidence, HostModel
from powerband.spec.workload.arrivals import Arrivals, OpenLoop
from powerband.spec.workload.lengths import Fixed, Lengths
from powerband.spec.workload.schedule import Schedule
from powerband.spec.workload.workload import RequestMix, Workload

NO_HOST = HostModel(
    step_s=0.0, per_request_s=0.0, arrival_s=0.0, answer_s=0.0, overlapped=False, evidence=Evidence(source="", error=0)
)


class PlainModel:
    """base_s, and so much for each new token and for each token of context."""

    band = 0.1

    def __init__(
        self,
        base_s: float = 0.01,
        new_s: float = 1e-5,
        context_s: float = 1e-8,
        host: HostModel = NO_HOST,
        num_stages: int = 1,
    ) -> None:
        self.base_s, self.new_s, self.context_s = base_s, new_s, context_s
        self.host, self.num_stages = host, num_stages

    def step_s(self, works: Sequence[tuple[int, int]], sampled: int) -> float:
        return self.base_s + self.new_s * sum(w[0] for w in works) + self.context_s * sum(w[1] for w in works)

    def parts(self, works: Sequence[tuple[int, int]], sampled: int) -> dict[str, float]:
        return {"projections": self.step_s(works, sampled)}

    def bounds(self, works: Sequence[tuple[int, int]], sampled: int) -> dict[str, float]:
        return {"bandwidth": self.step_s(works, sampled)}


def deployment(count: int = 1, **replica: Any) -> Deployment:
    values = {"device": "none", "max_model_len": 4096, **replica}
    return Deployment(engine="vllm", pools=(ReplicaPool(replica=Replica(**values), count=count),))


def drawn(
    num_requests: int,
    *,
    rate: float = 10.0,
    prompt: Lengths | None = None,
    output: Lengths | None = None,
    arrivals: Arrivals | None = None,
    seed: int = 0,
    **mix: Any,
) -> Schedule:
    requests = RequestMix(prompt or Fixed(100), output or Fixed(20), **mix)
    workload = Workload(name="test", arrivals=arrivals or OpenLoop.at(rate), requests=requests)
    return workload.draw(seed, num_requests=num_requests)


def played(
    schedule: Schedule,
    where: Deployment | None = None,
    model: PlainModel | None = None,
    *,
    num_blocks: int = 4000,
    play: Callable[..., Simulation] = simulate,
    **options: Any,
) -> Simulation:
    where = where or deployment()
    pools = len(where.pools)
    return play(schedule, where, [model or PlainModel()] * pools, [num_blocks] * pools, 16, **options)
