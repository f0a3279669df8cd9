"""One replica in virtual time: the engine's own core, with a model of its steps and its host in place of a device."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Protocol

from powerband.core.admission import SchedulerLimits
from powerband.core.clock import VirtualClock
from powerband.core.kv_cache import KVCacheManager
from powerband.core.loop import EngineCore
from powerband.core.request import Request
from powerband.core.scheduler import Scheduler
from powerband.core.simulation import SimExecutor, SimHandle, TraceInbox
from powerband.core.step import Step, TokenOutput, Work
from powerband.planner.clients import answer_start
from powerband.spec.deployment import EngineName, Replica
from powerband.spec.profile import HostLaw

_MOST_SHAPES = 128  # of steps that are kept to tell where the time goes
_NO_LIMIT = 1 << 40
_DRAFT = -1  # a draft's value does not matter: chance accepts it

Shape = tuple[list[tuple[int, int]], int]  # a step's (new tokens, context after them) of each request, rows sampled


class StepModel(Protocol):
    """What a step costs on a replica. cost.latency.LatencyModel is one; tests use constants."""

    num_stages: int
    host: HostLaw

    @property
    def band(self) -> float: ...
    def step_s(self, works: Sequence[tuple[int, int]], sampled: int) -> float: ...
    def parts(self, works: Sequence[tuple[int, int]], sampled: int) -> Mapping[str, float]: ...
    def bounds(self, works: Sequence[tuple[int, int]], sampled: int) -> Mapping[str, float]: ...


class ModelExecutor(SimExecutor):
    """Steps that take what the model says. slowdown: factor on every time. It keeps count, and some steps' shapes."""

    clock: VirtualClock

    def __init__(self, clock: VirtualClock, model: StepModel, replica: Replica, slowdown: float, seed: int) -> None:
        stages = model.num_stages
        super().__init__(
            clock, self.device_s, num_stages=stages, overlap=model.host.overlapped and stages == 1, sample=self._sample
        )
        self.model = model
        self.slowdown = slowdown
        self.busy_s = 0.0
        self.num_steps = 0
        self.shapes: list[Shape] = []
        self.last_tokens = 0  # of the last step
        self._acceptance = replica.draft_acceptance
        self._seed = seed
        self._stride = 1

    def submit(self, step: Step) -> SimHandle:
        new = sum(work.new is not None for work in step.works) if self.model.host.per_new_s else 0
        self.submit_s = self.host_s(len(step.works), new)
        return super().submit(step)

    def host_s(self, num_works: int, num_new: int = 0) -> float:
        """The host's own work for a step."""
        host = self.model.host
        return (host.step_s + host.per_request_s * num_works + host.per_new_s * num_new) * self.slowdown

    def device_s(self, step: Step) -> float:
        works = [(work.num_tokens, work.start + work.num_tokens) for work in step.works]
        self.last_tokens = step.num_tokens
        return self.count(works, sum(1 + len(work.drafts) for work in step.works if work.samples))

    def count(self, works: list[tuple[int, int]], sampled: int) -> float:
        """Seconds of a step, which is then counted. Of all steps, equally spaced ones are kept."""
        seconds = self.model.step_s(works, sampled) * self.slowdown
        self.busy_s += seconds
        if self.num_steps % self._stride == 0:
            self.shapes.append((works, sampled))
            if len(self.shapes) > _MOST_SHAPES:
                self.shapes = self.shapes[::2]
                self._stride *= 2
        self.num_steps += 1
        return seconds

    def _sample(self, work: Work) -> list[int]:
        """As many drafts as chance accepts, and a token of the model's own."""
        accepted = 0
        if work.drafts:
            chance = random.Random(f"{self._seed}/{work.id}/{work.start}")  # noqa: S311 (no secret)
            while accepted < len(work.drafts) and chance.random() < self._acceptance:
                accepted += 1
        first = answer_start(int(work.id)) + work.start + work.num_tokens - len(work.drafts)
        return list(range(first, first + accepted + 1))


class SimulatedReplica:
    """An engine and what is needed to tell when it acts next. seed: of its chance (acceptance of drafts)."""

    def __init__(
        self,
        replica: Replica,
        engine: EngineName,
        model: StepModel,
        *,
        num_blocks: int,
        block_size: int,
        slowdown: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.clock = VirtualClock()
        self.inbox = TraceInbox(self.clock, ())
        self.executor = ModelExecutor(self.clock, model, replica, slowdown, seed)
        kv = KVCacheManager(num_blocks, block_size, prefix_caching=replica.enable_prefix_caching)
        self.scheduler = Scheduler(
            kv,
            _limits(replica, engine),
            relay=self.executor.relay,
            num_stages=model.num_stages,
            propose=_proposer(replica.draft_tokens) if replica.draft_tokens else None,
        )
        self.core = EngineCore(self.scheduler, self.executor, self.clock, self.inbox)
        self.short_of_memory = 0  # steps in which a seat was free, but no block for who waited

    @property
    def next_s(self) -> float:
        """When it acts next; infinity: not before it hears of another request."""
        if self.core.is_working:
            return self.clock.now()
        due_s = self.inbox.next_time()
        return math.inf if due_s is None else max(due_s, self.clock.now())

    def advance(self) -> list[TokenOutput]:
        """One round of the engine's loop."""
        outputs = self.core.step()
        if self.is_short_of_memory:
            self.short_of_memory += 1
        return outputs

    @property
    def is_short_of_memory(self) -> bool:
        """Whether the last step had a seat and tokens left for who waits, but no blocks."""
        scheduler, limits = self.scheduler, self.scheduler.limits
        has_seat = len(scheduler.running) < limits.max_num_seqs
        return bool(scheduler.waiting) and has_seat and self.executor.last_tokens < limits.max_num_batched_tokens


def _limits(replica: Replica, engine: EngineName) -> SchedulerLimits:
    """Other engines than ours queue without end."""
    queue = {} if engine == "powerband" else {"max_num_queued_reqs": _NO_LIMIT, "max_num_queued_tokens": _NO_LIMIT}
    return SchedulerLimits(
        max_model_len=replica.max_model_len,
        max_num_seqs=replica.max_num_seqs,
        max_num_batched_tokens=replica.max_num_batched_tokens,
        long_prefill_token_threshold=replica.long_prefill_token_threshold,
        **queue,
    )


class _proposer:
    """Always as many drafts; whether they are any good is the executor's to say."""

    def __init__(self, num_drafts: int) -> None:
        self._drafts = [_DRAFT] * num_drafts

    def __call__(self, _request: Request) -> list[int]:
        return list(self._drafts)
