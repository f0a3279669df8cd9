"""A deployment under a schedule, in virtual time: the gateway's own dispatcher, and in each replica the engine's core.

    schedule ──► clients ──► Dispatcher ──► replica: EngineCore + model of its steps ──► tokens ──► records
                   ▲             ▲                                                         │
                   │             └───── first tokens, ends, load reports ◄─────────────────┤
                   └─────────────────── the next turn, after thinking ◄────────────────────┘

The dispatcher knows what it would know in a gateway: prompt tokens, the limit of the output, which prompts begin alike,
and once a second each replica's load. Every replica has a clock of its own, and the one whose next act is earliest
always goes first, so that no event comes late. Equal inputs give equal results.
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
from powerband.dispatch.backend import BackendSpec, InFlightRequest
from powerband.dispatch.dispatcher import Dispatcher
from powerband.dispatch.errors import PoolError
from powerband.dispatch.estimates import OutputEstimate
from powerband.dispatch.options import DispatchOptions
from powerband.dispatch.queue import QueuedRequest
from powerband.dispatch.request import DispatchRequest
from powerband.metrics.record import RequestRecord
from powerband.planner.simulation.clients import ConversationClient, SimulatedRequest
from powerband.planner.simulation.replica import SimulatedReplica, StepModel
from powerband.spec.deployment import Deployment
from powerband.spec.kv_layout import KVLayout
from powerband.spec.workload.schedule import Schedule

# An engine without a gateway before it: whatever is sent is queued at the engine.
NO_GATEWAY = DispatchOptions(max_waiting_per_replica=1 << 40, max_queue_wait_s=math.inf)
# What happens to a request of a chain, in the order of what happens at once.
_FIRST_TOKEN, _END, _ARRIVAL = range(3)
_MAX_IDLE_REPORTS = 1000  # of replicas that have nothing to do, before the next arrival


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
    num_refused: requests that the gateway refused, or that waited too long there.
    """

    records: list[RequestRecord]
    indices: list[int]
    replicas: tuple[ReplicaFigures, ...]
    seconds: float
    unsent: int
    gave_up: bool = False
    num_refused: int = 0

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
    layouts: Sequence[KVLayout | None] = (),  # of each pool's KV cache; empty: every layer keeps every position
    slowdown: float = 1.0,  # factor on every duration
    options: DispatchOptions | None = None,  # default: those of a gateway without settings of its own
    planned_rate: float | None = None,  # requests a second that the gateway expects; None: it does not know
    slo_ttft_s: float | None = None,  # that the gateway refuses requests for in an overload; None: there is none
    fast_forward: bool = True,  # apply identical steps at once: same result, less time
    max_waiting: float = math.inf,
) -> Simulation:
    """Simulate `schedule` to its end.

    It gives up when more than `max_waiting` requests wait for their first token: those without an answer timed out.
    """
    pools = [index for index, pool in enumerate(deployment.pools) for _ in range(pool.count)]
    replicas = [
        SimulatedReplica(
            deployment.pools[index].replica,
            deployment.engine,
            models[index],
            num_blocks=num_blocks[index],
            block_size=block_size,
            layout=layouts[index] if layouts else None,
            slowdown=slowdown,
            seed=schedule.seed,
            fast_forward=fast_forward,
        )
        for index in pools
    ]
    dispatcher = dispatcher_for(deployment, options, planned_rate=planned_rate, slo_ttft_s=slo_ttft_s)
    simulator = _Simulator(schedule, replicas, pools, slowdown, dispatcher, max_waiting)
    simulator.play()
    return simulator.result()


def dispatcher_for(
    deployment: Deployment,
    options: DispatchOptions | None = None,
    *,
    planned_rate: float | None = None,
    slo_ttft_s: float | None = None,
) -> Dispatcher:
    """At the start of a simulation: every replica is ready. Backends are named '0', '1', … through all pools."""
    dispatcher = Dispatcher(options)
    pools = [pool for pool in deployment.pools for _ in range(pool.count)]
    specs = [
        BackendSpec(id=f"{i}", max_num_seqs=pool.replica.max_num_seqs, max_prompt_tokens=pool.max_prompt_tokens)
        for i, pool in enumerate(pools)
    ]
    dispatcher.update(specs, 0.0, planned_rate=planned_rate, slo_ttft_s=slo_ttft_s)
    for backend in dispatcher.backends:
        backend.probe_succeeded(0.0)
        dispatcher.changed(backend, 0.0)
    return dispatcher


class _Simulator:
    """Clients, gateway and replicas. pools: of which each replica is one."""

    def __init__(
        self,
        schedule: Schedule,
        replicas: list[SimulatedReplica],
        pools: list[int],
        slowdown: float,
        dispatcher: Dispatcher,
        max_waiting: float,
    ) -> None:
        self._duration_s = schedule.duration_s
        self._slowdown = slowdown
        self._dispatcher = dispatcher
        self._outputs = OutputEstimate()
        self._max_waiting, self._waiting = max_waiting, 0  # for their first token
        self._replicas, self._pools = replicas, pools
        self._front_free_s = [0.0] * len(self._replicas)  # when each replica's front end can take the next request
        self._clients = [ConversationClient(chain) for chain in schedule.chains]
        self._queued: dict[QueuedRequest, SimulatedRequest] = {}
        self._open: dict[str, SimulatedRequest] = {}  # at a replica
        self._records: dict[int, RequestRecord] = {}
        # (time, chain, kind, request): an arrival, a first token or the end of an answer. A chain has one request open.
        self._events: list[tuple[float, int, int, SimulatedRequest | None]] = []
        self._report_s = dispatcher.options.metrics_interval_s  # when replicas next report their load
        self._deadline_s = math.inf  # of the dispatcher
        self._end_s = 0.0
        self._num_refused = 0
        for number, client in enumerate(self._clients):
            self._plan(client.chain.start_s, number)

    def play(self) -> None:
        while self._waiting <= self._max_waiting:
            event_s = self._events[0][0] if self._events else math.inf
            control_s = min(self._deadline_s, self._report_s)
            replica = min(self._replicas, key=_next_s)
            next_s = replica.next_s
            if event_s == next_s == math.inf and not self._queued:
                return
            if control_s <= event_s and control_s <= next_s:
                self._control(control_s)
            elif event_s <= next_s:
                self._happen(*heapq.heappop(self._events))
            else:
                outputs = replica.advance(min(event_s, control_s), self._on_run, self._on_first_token)
                self._on_outputs(outputs)

    def result(self) -> Simulation:
        for opened in (*self._open.values(), *self._queued.values()):  # where it gave up
            self._records[opened.planned.index] = opened.record(None)
        return Simulation(
            [self._records[index] for index in sorted(self._records)],
            sorted(self._records),
            tuple(_figures(replica, pool) for replica, pool in zip(self._replicas, self._pools, strict=True)),
            self._end_s,
            sum(len(client.chain.requests) for client in self._clients) - len(self._records),
            self._waiting > self._max_waiting,
            self._num_refused,
        )

    def _plan(self, time_s: float, number: int) -> None:
        """The next request of a chain, if there is time for it."""
        if time_s <= self._duration_s:
            heapq.heappush(self._events, (time_s, number, _ARRIVAL, None))

    # What happens at the gateway.

    def _control(self, now: float) -> None:
        """The dispatcher's timers, and the load that replicas report."""
        if self._deadline_s <= now:
            self._dispatcher.tick(now)
        if self._report_s <= now:
            self._report_s += self._dispatcher.options.metrics_interval_s
            for replica, backend in zip(self._replicas, self._dispatcher.backends, strict=True):
                self._on_outputs(replica.settle(now, self._on_run))
                self._dispatcher.reported(backend, replica.load, now)
            self._skip_idle_reports()
        self._deliver(now)

    def _skip_idle_reports(self) -> None:
        """In a long pause of the workload, every replica would report every second that it does nothing."""
        interval_s = self._dispatcher.options.metrics_interval_s
        if self._queued or self._open or not self._events:
            return
        num_reports = (self._events[0][0] - self._report_s) // interval_s
        if num_reports > _MAX_IDLE_REPORTS:
            self._report_s += num_reports * interval_s

    def _happen(self, now: float, number: int, kind: int, opened: SimulatedRequest | None) -> None:
        if opened is None:
            self._arrive(now, number)
        elif opened.placed is None:
            return
        elif kind == _FIRST_TOKEN:
            self._dispatcher.first_token(opened.placed, now, opened.prompt_tokens)
        else:
            output_tokens = sum(opened.chunks)
            self._outputs.observe(output_tokens)
            self._dispatcher.release(opened.placed, "ok", now, output_tokens=output_tokens)
            self._deliver(now)
            self._plan_next(now, number)

    def _arrive(self, now: float, number: int) -> None:
        client = self._clients[number]
        planned = client.next
        if planned is None:
            return
        opened = SimulatedRequest(planned, number, now, client.prompt_tokens)
        request = DispatchRequest(
            prompt_tokens=opened.prompt_tokens,
            output_tokens=self._outputs.likely(planned.output_tokens),
            stream=True,
            arrival_s=now,
            prefix_keys=client.prefix_keys() if len(self._replicas) > 1 else (),  # one replica needs no choice
        )
        self._waiting += 1
        try:
            placed = self._dispatcher.submit(request, now)
        except PoolError:
            self._refuse(opened, now)
        else:
            if isinstance(placed, InFlightRequest):
                self._send(opened, placed, now)
            else:
                self._queued[placed] = opened
        self._deliver(now)

    def _deliver(self, now: float) -> None:
        """Carry out what the dispatcher has decided."""
        for queued in self._dispatcher.take_decided():
            opened, outcome = self._queued.pop(queued), queued.outcome
            if isinstance(outcome, InFlightRequest):
                self._send(opened, outcome, now)
            else:
                self._refuse(opened, now)
        deadline_s = self._dispatcher.next_deadline()
        self._deadline_s = math.inf if deadline_s is None else deadline_s

    def _send(self, opened: SimulatedRequest, placed: InFlightRequest, now: float) -> None:
        index = int(placed.backend.id)
        replica, client = self._replicas[index], self._clients[opened.chain]
        host = replica.model.host
        begin_s = max(now, self._front_free_s[index])
        self._front_free_s[index] = begin_s + host.front_s * self._slowdown
        arrival_s = host.arrival_s + host.arrival_token_s * opened.prompt_tokens
        request = client.next_request(begin_s + arrival_s * self._slowdown)
        opened.placed = placed
        opened.answer_s, opened.answer_request_s = (
            host.answer_s * self._slowdown,
            host.answer_request_s * self._slowdown,
        )
        self._open[request.id] = opened
        replica.inbox.send(request.arrival_s, Add(request))

    def _refuse(self, opened: SimulatedRequest, now: float) -> None:
        self._waiting -= 1
        self._num_refused += 1
        record = self._records[opened.planned.index] = opened.refused()
        self._end_s = max(self._end_s, now)
        self._clients[opened.chain].on_complete(record)
        self._plan_next(now, opened.chain)

    def _plan_next(self, now: float, number: int) -> None:
        planned = self._clients[number].next
        if planned is not None:
            self._plan(now + planned.think_s, number)

    # What happens at replicas.

    def _on_first_token(self, r: Request, time_s: float, requests: int) -> None:
        self._first_token(self._open[r.id], time_s, requests)

    def _first_token(self, opened: SimulatedRequest, time_s: float, requests: int) -> None:
        if not opened.has_first_token:
            opened.has_first_token = True
            heapq.heappush(self._events, (time_s + opened.lag_s(requests), opened.chain, _FIRST_TOKEN, opened))

    def _on_run(self, r: Request, times_s: array[float], requests: int) -> None:
        opened = self._open[r.id]
        self._waiting -= not opened.times_s
        opened.on_run(times_s, r.num_cached, requests)

    def _on_outputs(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            self._on_output(output, len(outputs))

    def _on_output(self, output: TokenOutput, requests: int) -> None:
        opened = self._open[output.id]
        was_waiting = not opened.times_s
        opened.on_output(output, requests)
        self._waiting -= was_waiting and bool(opened.times_s or output.finish_reason)
        if opened.times_s:
            self._first_token(opened, output.time_s, requests)
        if output.finish_reason is None:
            return
        del self._open[output.id]
        record = self._records[opened.planned.index] = opened.record(output.finish_reason)
        end_s = opened.times_s[-1] if opened.times_s else output.time_s + opened.lag_s(requests)
        self._end_s = max(self._end_s, end_s)
        self._clients[opened.chain].on_complete(record)
        heapq.heappush(self._events, (end_s, opened.chain, _END, opened))


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
