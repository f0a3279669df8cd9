"""What a simulation needs of a deployment: the model of a step, and the blocks of KV cache, of each pool's replicas."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from powerband.cost.latency import LatencyModel
from powerband.cost.replica_memory import plan_replica
from powerband.dispatch.options import DispatchOptions
from powerband.errors import EnvironmentFault, UsageError
from powerband.planner.simulation.simulator import Simulation, simulate
from powerband.spec.deployment import LOCAL, Deployment
from powerband.spec.hardware.profile import DeviceProfile
from powerband.spec.hardware.what_if import chosen_devices
from powerband.spec.kv_layout import KVLayout
from powerband.spec.model.model_spec import ModelSpec
from powerband.spec.workload.schedule import Schedule


@dataclass(frozen=True, slots=True)
class SimulationInputs:
    """A deployment that fits, with its models. models, num_blocks, layouts: by pool."""

    deployment: Deployment
    models: tuple[LatencyModel, ...]
    num_blocks: tuple[int, ...]
    block_size: int
    layouts: tuple[KVLayout | None, ...] = ()

    @property
    def band(self) -> float:
        return max(model.band for model in self.models)

    def simulate(
        self,
        schedule: Schedule,
        *,
        slowdown: float = 1.0,
        options: DispatchOptions | None = None,
        planned_rate: float | None = None,
        slo_ttft_s: float | None = None,
        max_waiting: float = math.inf,
    ) -> Simulation:
        """See planner.simulator.simulate."""
        return simulate(
            schedule,
            self.deployment,
            self.models,
            self.num_blocks,
            self.block_size,
            layouts=self.layouts,
            slowdown=slowdown,
            options=options,
            planned_rate=planned_rate,
            slo_ttft_s=slo_ttft_s,
            max_waiting=max_waiting,
        )


def simulation_inputs(
    spec: ModelSpec, deployment: Deployment, find: Callable[[str], DeviceProfile], *, constrained: bool
) -> SimulationInputs:
    """find: a device's profile by name. constrained: every answer has a grammar (Workload.constrains_answers).

    Raises UsageError for what a device cannot compute, EnvironmentFault where a replica does not fit.
    """
    models, blocks, sizes, layouts = [], [], set(), []
    for pool in deployment.pools:
        profile = find(pool.replica.device)
        memory = plan_replica(spec, profile, pool.replica, deployment.engine)
        if memory.problem:
            raise EnvironmentFault(f"A replica on {profile.name} does not fit: {memory.problem}.", param="plan")
        models.append(LatencyModel(spec, profile, pool.replica, deployment.engine, constrained=constrained))
        blocks.append(memory.num_blocks)
        sizes.add(memory.block_size)
        layouts.append(memory.layout)
    return SimulationInputs(deployment, tuple(models), tuple(blocks), min(sizes), tuple(layouts))


def profile_finder(deployment: Deployment, devices: str | None, changes: list[str]) -> Callable[[str], DeviceProfile]:
    """From a device's name in the plan to what is known of it. Raises UsageError."""
    named = list(dict.fromkeys(pool.replica.device for pool in deployment.pools))
    if any(change.startswith("replica.") for change in changes):
        raise UsageError("The plan describes its replicas.", hint="Change it in the plan's file.", param="set")
    replicas = sum(pool.count for pool in deployment.pools if pool.replica.device == LOCAL) or None
    chosen = chosen_devices(devices or ",".join(named), None, changes, replicas)
    profiles = {profile.name: profile for profile in chosen}
    missing = [name for name in named if name not in profiles]
    if missing:
        raise UsageError(
            f"The plan's {missing[0]} is not among {', '.join(profiles)}.",
            hint="--devices names all of a plan's devices.",
            param="devices",
        )
    return profiles.__getitem__
