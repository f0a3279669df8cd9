"""A gateway and the simulator, given the same arrivals and equally fast replicas, dispatch alike.

They send the same requests to the same replicas in the same order, and refuse the same ones.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st
from plans import NO_HOST, PlainModel, drawn, played

from powerband.core.loop import Add
from powerband.core.step import TokenOutput
from powerband.dispatch.errors import PoolError
from powerband.dispatch.estimates import OutputEstimate
from powerband.dispatch.options import DispatchOptions
from powerband.gateway.dispatch.pool import Lease, Pool
from powerband.gateway.options import PoolOptions
from powerband.gateway.request import GatewayRequest
from powerband.gateway.routes import ModelRoute, ReplicaAddress
from powerband.gateway.settings import GatewaySettings
from powerband.planner.simulation import simulator
from powerband.planner.simulation.clients import ConversationClient, SimulatedRequest
from powerband.planner.simulation.replica import SimulatedReplica
from powerband.spec.deployment import Deployment, Replica, ReplicaPool
from powerband.spec.slo import SLO
from powerband.spec.workload.arrivals import ClosedLoop, OpenLoop
from powerband.spec.workload.lengths import Fixed, Uniform
from powerband.spec.workload.schedule import Schedule
from powerband.spec.workload.workload import Conversation, SharedPrefix
from virtual_loop import VirtualLoop, virtually

REFUSED = "refused"
Dispatches = list[tuple[int, str]]  # index of the request, and its replica or REFUSED; in this order
HOST = dataclasses.replace(
    NO_HOST, step_s=0.001, per_request_s=1e-4, arrival_s=0.0041, arrival_token_s=1.3e-6, answer_s=0.0103
)


@dataclass(frozen=True)
class World:
    schedule: Schedule
    deployment: Deployment
    model: PlainModel
    num_blocks: int
    planned_rate: float | None
    slo_ttft_s: float | None


def world(seed: int) -> World:
    """Small and random: some with queues, conversations, shared prefixes, length pools, little memory or overload."""
    rng = random.Random(seed)
    talk = Conversation(Uniform(1, 5), think_s=rng.uniform(0.2, 2)) if rng.random() < 0.5 else None
    prefix = SharedPrefix(Fixed(rng.randrange(60, 400)), groups=rng.randrange(1, 5)) if rng.random() < 0.5 else None
    rate = rng.choice([5.0, 20.0, 60.0])
    schedule = drawn(
        rng.randrange(30, 120),
        arrivals=ClosedLoop(rng.randrange(4, 30), rng.uniform(0.05, 0.5)) if rng.random() < 0.2 else OpenLoop.at(rate),
        prompt=Uniform(1, rng.choice([100, 300])),
        output=Uniform(1, rng.choice([20, 120])),
        conversation=talk,
        prefix=prefix,
        seed=seed,
    )
    pools = []
    for max_prompt_tokens in (rng.choice([100, 200]), None) if rng.random() < 0.3 else (None,):
        layout = Replica(device="none", max_model_len=4096, max_num_seqs=rng.choice([1, 2, 4, 16]))
        pools.append(ReplicaPool(replica=layout, count=rng.randrange(1, 4), max_prompt_tokens=max_prompt_tokens))
    return World(
        schedule,
        Deployment(engine="vllm", pools=tuple(pools)),
        PlainModel(0.0117, 1.7e-5, 1.1e-6, dataclasses.replace(HOST, overlapped=rng.random() < 0.5)),
        num_blocks=rng.choice([60, 120, 4000]),
        planned_rate=rng.choice([None, rate]),
        slo_ttft_s=rng.choice([None, 0.3, 1.0]),
    )


def ignored(*_: object) -> None:
    """In place of a mock, which takes longer to make than a step."""


def simulated(w: World, options: DispatchOptions | None = None) -> Dispatches:
    found: Dispatches = []

    class Recorded(simulator._Simulator):
        def _send(self, opened: SimulatedRequest, placed: Any, now: float) -> None:
            found.append((opened.planned.index, placed.backend.id))
            super()._send(opened, placed, now)

        def _refuse(self, opened: SimulatedRequest, now: float) -> None:
            found.append((opened.planned.index, REFUSED))
            super()._refuse(opened, now)

    with mock.patch.object(simulator, "_Simulator", Recorded):
        played(
            w.schedule,
            w.deployment,
            w.model,
            num_blocks=w.num_blocks,
            options=options,
            planned_rate=w.planned_rate,
            slo_ttft_s=w.slo_ttft_s,
        )
    return found


@dataclass
class Service:
    """A gateway's pool on an event loop, with clients before it and replicas behind it that step when timers say so."""

    loop: VirtualLoop
    world: World
    dispatched: Dispatches = field(default_factory=list)
    output: OutputEstimate = field(default_factory=OutputEstimate)
    open: dict[str, tuple[SimulatedRequest, Lease, asyncio.Future[Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        w, pools = self.world, self.world.deployment.pools
        layouts = [pool for pool in pools for _ in range(pool.count)]
        self.replicas = [
            SimulatedReplica(
                pool.replica,
                "vllm",
                w.model,
                num_blocks=w.num_blocks,
                block_size=16,
                fast_forward=False,
            )
            for pool in layouts
        ]
        addresses = [
            ReplicaAddress(
                id=f"{i}",
                url=f"http://r{i}:1",
                model="m",
                max_num_seqs=pool.replica.max_num_seqs,
                max_prompt_tokens=pool.max_prompt_tokens,
            )
            for i, pool in enumerate(layouts)
        ]
        self.pool = Pool(GatewaySettings().pool, clock=self.loop.time)
        slo = None if w.slo_ttft_s is None else SLO(ttft_s=w.slo_ttft_s)
        self.pool.update(ModelRoute(name="m", replicas=tuple(addresses), rate=w.planned_rate, slo=slo))
        for backend in self.pool.backends:
            backend.probe_succeeded(0.0)
            self.pool.changed(backend)
        self.timers: list[asyncio.TimerHandle | None] = [None] * len(layouts)

    async def run(self) -> Dispatches:
        reporting = asyncio.ensure_future(self.report())
        try:
            await asyncio.gather(*(self.converse(i) for i in range(len(self.world.schedule.chains))))
        finally:
            reporting.cancel()
        return self.dispatched

    async def report(self) -> None:
        at_s = 0.0
        while True:
            at_s += self.pool.options.metrics_interval_s
            await self.until(at_s)
            for replica, backend in zip(self.replicas, self.pool.backends, strict=True):
                self.pool.reported(backend, replica.load)

    async def until(self, time_s: float) -> None:
        if time_s > self.loop.time():
            future = self.loop.create_future()
            self.loop.call_at(time_s, future.set_result, None)
            await future

    async def converse(self, number: int) -> None:
        client = ConversationClient(self.world.schedule.chains[number])
        await self.until(client.chain.start_s)
        while (planned := client.next) is not None:
            sent = SimulatedRequest(planned, number, self.loop.time(), client.prompt_tokens)
            request = GatewayRequest(
                id=f"{planned.index}",
                endpoint="chat",
                model="m",
                prompt_tokens=sent.prompt_tokens,
                output_tokens=self.output.likely(planned.output_tokens),
                stream=True,
                arrival_s=self.loop.time(),
                prefix_keys=client.prefix_keys(),
            )
            try:
                lease = await self.pool.lease(request)
            except PoolError:
                self.dispatched.append((planned.index, REFUSED))
                client.on_complete(sent.refused())
            else:
                self.dispatched.append((planned.index, lease.replica.id))
                client.on_complete(await self.send(client, sent, lease))
            if client.next is not None:
                await self.until(self.loop.time() + client.next.think_s)

    def send(self, client: ConversationClient, sent: SimulatedRequest, lease: Lease) -> asyncio.Future[Any]:
        index, host = int(lease.replica.id), self.world.model.host
        request = client.next_request(self.loop.time() + host.arrival_s + host.arrival_token_s * sent.prompt_tokens)
        answer = self.loop.create_future()
        sent.answer_s = host.answer_s
        self.open[request.id] = (sent, lease, answer)
        self.replicas[index].inbox.send(request.arrival_s, Add(request))
        self.plan_step(index)
        return answer

    def plan_step(self, index: int) -> None:
        timer, next_s = self.timers[index], self.replicas[index].next_s
        if timer is not None:
            timer.cancel()
        self.timers[index] = self.loop.call_at(next_s, self.step, index) if next_s < float("inf") else None

    def step(self, index: int) -> None:
        outputs = self.replicas[index].advance(0.0, on_run=ignored, on_first_token=ignored)
        if outputs:
            self.loop.call_at(outputs[0].time_s + self.world.model.host.answer_s, self.receive, outputs)
        self.timers[index] = None
        self.plan_step(index)

    def receive(self, outputs: list[TokenOutput]) -> None:
        for output in sorted(outputs, key=lambda output: self.open[output.id][0].chain):
            sent, lease, answer = self.open[output.id]
            sent.on_output(output, len(outputs))
            if output.token_ids:
                lease.first_token(sent.prompt_tokens)
            if output.finish_reason is not None:
                del self.open[output.id]
                record = sent.record(output.finish_reason)
                self.output.observe(record.output_tokens)
                lease.close("ok", output_tokens=record.output_tokens)
                answer.set_result(record)


def served(w: World) -> Dispatches:
    async def run(loop: VirtualLoop) -> Dispatches:
        return await Service(loop, w).run()

    return virtually(run, start_s=0.0, within_s=1e6)


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_gateway_and_simulator_dispatch_alike(seed: int) -> None:
    w = world(seed)
    assert simulated(w) == served(w)


def test_these_worlds_queue_refuse_and_prefer_replicas() -> None:
    """Or equality would say little."""
    found: Counter[str] = Counter()
    for seed in range(30):
        w = world(seed)
        own = simulated(w)
        found["refused"] += any(replica == REFUSED for _, replica in own)
        found["out of order"] += [index for index, _ in own] != sorted(index for index, _ in own)
        found["several replicas"] += len({replica for _, replica in own}) > 1
        found["by prefix"] += own != simulated(w, DispatchOptions(routing="least-outstanding"))
        found["two may wait at a replica"] += own != simulated(w, DispatchOptions(max_waiting_per_replica=100))
    assert min(found.values()) >= 3, found


def test_the_simulator_s_options_are_those_of_a_gateway_without_settings() -> None:
    defaults = GatewaySettings().pool
    assert defaults == PoolOptions()
    own = DispatchOptions()
    assert all(getattr(own, f.name) == getattr(defaults, f.name) for f in dataclasses.fields(own))
