"""A deployment under a schedule, in virtual time: the engine's own core for every replica, the gateway's routing.

    schedule ──► talks ──► routing ──► replica: EngineCore + model of its steps ──► tokens ──► records
                   ▲                                                                   │
                   └────────────────────── the next turn, after thinking ◄─────────────┘

Every replica has a clock of its own, and the one whose next act is earliest always goes first, so that none hears of
anything late. Equal inputs give equal results.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from powerband.core.loop import Add
from powerband.core.request import Request
from powerband.core.step import TokenOutput
from powerband.metrics.record import RequestRecord
from powerband.planner.simulation.clients import ConversationClient, SimulatedRequest
from powerband.planner.simulation.replica import SimulatedReplica, StepModel
from powerband.planner.simulation.routing import ByPromptLength, LeastOutstanding, RoutingPolicy, Sticky
from powerband.spec.deployment import Deployment
from powerband.spec.workload.workload import Schedule


@dataclass(frozen=True, slots=True)
class ReplicaFigures:
    """What one replica did. Prefix figures in prompt tokens. short_of_memory: steps in which a request waited for
    blocks of KV cache alone.
    """

    pool: int
    busy_s: float
    num_steps: int
    num_preemptions: int
    prefix_queries: int
    prefix_hits: int
    short_of_memory: int
    operators: dict[str, float]  # seconds by operator, estimated from some of the steps
    bounds: dict[str, float]  # the same seconds by what bound them


@dataclass(frozen=True, slots=True)
class Simulation:
    """records: of every request that was sent; indices: theirs. seconds: until the last answer. unsent: later than the
    schedule lasts, or turns of a conversation that lost an answer. gave_up: it was not played to its end.
    """

    records: list[RequestRecord]
    indices: list[int]
    replicas: tuple[ReplicaFigures, ...]
    seconds: float
    unsent: int
    gave_up: bool = False

    def total(self, name: str) -> float:
        """Of a figure over all replicas."""
        return float(sum(getattr(replica, name) for replica in self.replicas))


def simulate(
    schedule: Schedule,
    deployment: Deployment,
    models: Sequence[StepModel],  # one for each pool
    num_blocks: Sequence[int],  # of a replica of each pool
    block_size: int,
    *,
    slowdown: float = 1.0,  # factor on every duration
    routing: RoutingPolicy | None = None,  # default: routing_for(deployment)
    fast_forward: bool = True,  # apply identical steps at once: same result, less time
    max_waiting: float = math.inf,
) -> Simulation:
    """Simulate `schedule` to its end.

    It gives up when more than `max_waiting` requests wait for their first token: those without an answer timed out.
    """
    replicas = [
        SimulatedReplica(
            pool.replica,
            deployment.engine,
            models[index],
            num_blocks=num_blocks[index],
            block_size=block_size,
            slowdown=slowdown,
            seed=schedule.seed,
            fast_forward=fast_forward,
        )
        for index, pool in enumerate(deployment.pools)
        for _ in range(pool.count)
    ]
    pools = [index for index, pool in enumerate(deployment.pools) for _ in range(pool.count)]
    world = _Simulator(schedule, replicas, pools, slowdown, routing or routing_for(deployment), max_waiting)
    world.play()
    return world.result()


def routing_for(deployment: Deployment) -> RoutingPolicy:
    """By prompt length between pools; sticky, else least outstanding tokens, within a pool."""
    pools = [LeastOutstanding(pool.count) for pool in deployment.pools]
    limits = [pool.max_prompt_tokens for pool in deployment.pools if pool.max_prompt_tokens is not None]
    return Sticky(ByPromptLength(limits, pools) if limits else pools[0])


class _Simulator:
    """Clients, gateway and replicas. pools: of which each replica is one."""

    def __init__(
        self,
        schedule: Schedule,
        replicas: list[SimulatedReplica],
        pools: list[int],
        slowdown: float,
        routing: RoutingPolicy,
        max_waiting: float,
    ) -> None:
        self._duration_s = schedule.duration_s
        self._slowdown = slowdown
        self._routing = routing
        self._max_waiting, self._waiting = max_waiting, 0  # for their first token
        self._replicas, self._pools = replicas, pools
        self._front_free_s = [0.0] * len(self._replicas)  # when each replica's front end can take the next request
        self._clients = [ConversationClient(chain) for chain in schedule.chains]
        self._open: dict[str, SimulatedRequest] = {}
        self._records: dict[int, RequestRecord] = {}
        # (time, chain, answered): a request that is due, or one whose answer is complete. A chain has one at most.
        self._events: list[tuple[float, int, SimulatedRequest | None]] = []
        self._end_s = 0.0
        for number, talk in enumerate(self._clients):
            self._plan(talk.chain.start_s, number)

    def play(self) -> None:
        while self._waiting <= self._max_waiting:
            event_s = self._events[0][0] if self._events else math.inf
            replica = min(self._replicas, key=_next_s)
            if event_s <= replica.next_s:
                if not self._events:
                    return
                self._happen(*heapq.heappop(self._events))
            else:
                outputs = replica.advance(event_s, self._on_run)
                for output in outputs:
                    self._on_output(output, len(outputs))

    def result(self) -> Simulation:
        for opened in self._open.values():  # where it gave up
            self._records[opened.planned.index] = opened.record(None)
        return Simulation(
            [self._records[index] for index in sorted(self._records)],
            sorted(self._records),
            tuple(_figures(replica, pool) for replica, pool in zip(self._replicas, self._pools, strict=True)),
            self._end_s,
            sum(len(talk.chain.requests) for talk in self._clients) - len(self._records),
            self._waiting > self._max_waiting,
        )

    def _push(self, time_s: float, chain: int, answered: SimulatedRequest | None) -> None:
        heapq.heappush(self._events, (time_s, chain, answered))

    def _plan(self, time_s: float, number: int) -> None:
        """The next request of a chain, if there is time for it."""
        if time_s <= self._duration_s:
            self._push(time_s, number, None)

    def _happen(self, now: float, number: int, answered: SimulatedRequest | None) -> None:
        if answered is not None:
            self._routing.answered(answered.replica, answered.tokens)
            planned = self._clients[number].next
            if planned is not None:
                self._plan(now + planned.think_s, number)
            return
        talk = self._clients[number]
        planned = talk.next
        if planned is None:
            return
        tokens = talk.prompt_tokens
        index = self._routing.choose(tokens, talk.session)
        replica = self._replicas[index]
        host = replica.model.host
        begin_s = max(now, self._front_free_s[index])
        self._front_free_s[index] = begin_s + host.front_s * self._slowdown
        request = talk.next_request(begin_s + (host.arrival_s + host.arrival_token_s * tokens) * self._slowdown)
        lags_s = host.answer_s * self._slowdown, host.answer_request_s * self._slowdown
        opened = SimulatedRequest(planned, number, now, tokens, index, *lags_s)
        self._open[request.id] = opened
        self._waiting += 1
        self._routing.sent(index, opened.tokens)
        replica.inbox.send(request.arrival_s, Add(request))

    def _on_run(self, r: Request, times_s: array[float], requests: int) -> None:
        opened = self._open[r.id]
        self._waiting -= not opened.times_s
        opened.on_run(times_s, r.num_cached, requests)

    def _on_output(self, output: TokenOutput, requests: int) -> None:
        opened = self._open[output.id]
        was_waiting = not opened.times_s
        opened.on_output(output, requests)
        self._waiting -= was_waiting and bool(opened.times_s or output.finish_reason)
        if output.finish_reason is None:
            return
        del self._open[output.id]
        record = self._records[opened.planned.index] = opened.record(output.finish_reason)
        end_s = output.time_s + opened.lag_s(requests)
        self._end_s = max(self._end_s, end_s)
        self._clients[opened.chain].on_complete(record)
        self._push(end_s, opened.chain, opened)


def _next_s(replica: SimulatedReplica) -> float:
    return replica.next_s


def _figures(replica: SimulatedReplica, pool: int) -> ReplicaFigures:
    executor, counters = replica.executor, replica.scheduler.counters
    operators: dict[str, float] = {}
    bounds: dict[str, float] = {}
    for works, sampled in executor.shapes:
        for found, into in (
            (executor.model.parts(works, sampled), operators),
            (executor.model.bounds(works, sampled), bounds),
        ):
            for name, seconds in found.items():
                into[name] = into.get(name, 0.0) + seconds
    for into in (operators, bounds):
        whole = sum(into.values())
        for name in into:
            into[name] *= executor.busy_s / whole if whole else 0.0
    return ReplicaFigures(
        pool=pool,
        busy_s=executor.busy_s,
        num_steps=counters.num_steps,
        num_preemptions=counters.num_preemptions,
        prefix_queries=counters.prefix_queries,
        prefix_hits=counters.prefix_hits,
        short_of_memory=replica.short_of_memory,
        operators=operators,
        bounds=bounds,
    )
