"""One replica in virtual time: the engine's own core, with a model of its steps and its host in place of a device."""

from __future__ import annotations

import hashlib
import math
from array import array
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import compress
from typing import Protocol

from powerband.core.admission import SchedulerLimits
from powerband.core.clock import VirtualClock
from powerband.core.kv_cache import KVCacheManager
from powerband.core.loop import EngineCore
from powerband.core.request import Request
from powerband.core.scheduler import Scheduler
from powerband.core.simulation import SimExecutor, SimHandle, TraceInbox
from powerband.core.step import Step, StepResult, TokenOutput, Work
from powerband.cost.engine_priors import ENGINE_PRIORS
from powerband.dispatch.backend import ReplicaLoad
from powerband.planner.simulation.clients import output_start
from powerband.planner.simulation.fast_forward import advance, ending, steady_rounds
from powerband.spec.deployment import EngineName, Replica
from powerband.spec.hardware.profile import HostModel
from powerband.spec.kv_layout import KVLayout

_AT_ONCE = 64  # rounds of a run that are planned before others get their turn
_MAX_SHAPES = 128  # of steps that are kept to tell where the time goes
_NO_LIMIT = 1 << 40
_DRAFT = -1  # a draft's value does not matter: chance accepts it

Shape = tuple[list[tuple[int, int]], int]  # a step's (new tokens, context after them) of each request, rows sampled

# A request, one of so many, got a token at each of these times.
OnRun = Callable[[Request, "array[float]", int], None]
# A request, one of so many, will get its first token at this time, which later commands do not change.
OnFirstToken = Callable[[Request, float, int], None]


class StepModel(Protocol):
    """What a step costs on a replica. cost.latency.LatencyModel is one; tests use constants."""

    num_stages: int
    host: HostModel

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
        self._log_acceptance = math.log(replica.draft_acceptance) if replica.draft_acceptance else 0.0
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
        sampled = sum(1 + len(work.drafts) for work in step.works if work.samples)
        seconds = self.model.step_s(works, sampled) * self.slowdown
        self.keep(seconds, lambda: works, sampled)
        return seconds

    def keep(self, seconds: float, works: Callable[[], list[tuple[int, int]]], sampled: int) -> None:
        """Count a step. Of all steps, the shapes of equally spaced ones are kept."""
        self.busy_s += seconds
        if self.num_steps % self._stride == 0:
            self.shapes.append((works(), sampled))
            if len(self.shapes) > _MAX_SHAPES:
                self.shapes = self.shapes[::2]
                self._stride *= 2
        self.num_steps += 1

    def tokens_of(self, r: Request, start: int, end: int) -> range:
        """The answer's tokens at positions [start, end)."""
        first = output_start(r.id)
        return range(first + start, first + end)

    @property
    def stage_free_s(self) -> float:
        """When its only stage is free."""
        return self._stage_free_s[0]

    @stage_free_s.setter
    def stage_free_s(self, time_s: float) -> None:
        self._stage_free_s[0] = time_s

    def _sample(self, work: Work) -> list[int]:
        """As many drafts as chance accepts, and a token of the model's own."""
        first = output_start(work.id) + work.start + work.num_tokens
        if not work.drafts:
            return [first]
        drawn = hashlib.blake2b(f"{self._seed}/{work.id}/{work.start}".encode(), digest_size=8).digest()
        chance = (int.from_bytes(drawn, "big") + 1) / 2**64  # above 0, up to 1
        # Geometric, by inversion: `n` are accepted with a chance of acceptance^n.
        accepted = min(int(math.log(chance) / self._log_acceptance), len(work.drafts)) if self._log_acceptance else 0
        first -= len(work.drafts)
        return list(range(first, first + accepted + 1))


class FastForward:
    """Rounds that can be foreseen: when each ends is known before any is done. `now_s`: when the next would begin.

    A command that comes meanwhile cuts it short: rounds that begin later are not done.
    """

    def __init__(self, core: EngineCore, executor: ModelExecutor, rounds: int) -> None:
        self._executor, self.left = executor, rounds  # rounds to plan
        running = core.scheduler.running
        self._last: SimHandle | None = core.inflight[-1].handle if core.inflight else None  # type: ignore[assignment] # ours
        self._contexts = [r.num_computed + 1 for r in running]  # of the next round
        ends = ending(running, rounds)
        self._continuing = (
            [r not in ends for r in running] if self._last and ends else None
        )  # who has a step in the last one
        self._free_s = executor.stage_free_s
        self.now_s = executor.clock.now()
        self.starts_s: list[float] = []
        self.seconds: list[float] = []  # of the device
        self.ends_s: list[float] = []  # on the device
        self.known_s = array("d")  # when its tokens, or in overlap those of the round before, are known

    def cut_s(self, due_s: float | None) -> float:
        """When the next round begins, if not one before it hears of a command that is due at `due_s`."""
        if due_s is None or due_s >= self.now_s:
            return self.now_s
        place = bisect_left(self.starts_s, due_s)
        return self.starts_s[place] if place < len(self.starts_s) else self.now_s

    def extend(self, until_s: float) -> None:
        """Go on to the first round that begins at `until_s` or later, but not for ever."""
        model_s, slowdown, contexts = self._executor.model.step_s, self._executor.slowdown, self._contexts
        count, overlap = len(contexts), self._last is not None
        host_s = self._executor.host_s(count)
        previous_s = self.ends_s[-1] if self.ends_s else self._last.end_s if self._last else 0.0
        for _ in range(min(self.left, _AT_ONCE)):
            if self.now_s >= until_s:
                break
            if self.left == 1 and self._continuing is not None:
                contexts = list(compress(contexts, self._continuing))
                count = len(contexts)
                host_s = self._executor.host_s(count)
            seconds = model_s([(1, context) for context in contexts], count) * slowdown
            contexts = [context + 1 for context in contexts]
            # As in SimExecutor.submit and SimHandle.result, to the last bit.
            submitted_s = self.now_s + host_s
            end_s = max(submitted_s, self._free_s) + seconds
            known_s = max(submitted_s, previous_s if overlap else end_s)
            self.starts_s.append(self.now_s)
            self.seconds.append(seconds)
            self.ends_s.append(end_s)
            self.known_s.append(known_s)
            self.now_s, self._free_s, previous_s = known_s, end_s, end_s
            self.left -= 1
        self._contexts = contexts

    def finish(self, core: EngineCore, due_s: float, on_run: OnRun) -> tuple[int, list[TokenOutput]]:
        """Do the rounds that begin before `due_s`; return how many, and the outputs of requests that have ended."""
        rounds = bisect_left(self.starts_s, due_s)
        if rounds == 0:
            return 0, []
        executor, running = self._executor, core.scheduler.running
        continuing = self._continuing if self.left == 0 and rounds == len(self.starts_s) else None
        first = [r.num_computed + 1 for r in running]
        for place, seconds in enumerate(self.seconds[:rounds]):
            if place == rounds - 1 and continuing is not None:
                first = list(compress(first, continuing))
            executor.keep(seconds, partial(_decodes, first, place), len(first))
        inflight = None
        if self._last is not None:
            submitted_s = self.starts_s[rounds - 1] + executor.host_s(len(first))
            places = [(r, len(r.tokens) + rounds) for r in running]
            tokens = {r.id: list(executor.tokens_of(r, place, place + 1)) for r, place in places}
            inflight = SimHandle(executor, self.ends_s[rounds - 1], StepResult(tokens)), submitted_s
        times_s = self.known_s[:rounds]
        for r in running:
            on_run(r, times_s, len(running))
        executor.last_tokens = len(first)
        executor.clock.wait_until(times_s[-1])
        executor.stage_free_s = self.ends_s[rounds - 1]
        return rounds, advance(core, rounds, executor.tokens_of, inflight, times_s[-1])


def _decodes(contexts: list[int], later: int) -> list[tuple[int, int]]:
    return [(1, context + later) for context in contexts]


class SimulatedReplica:
    """An engine, and when it acts next. seed: for the acceptance of drafts. layout: see ReplicaMemory.

    fast_forward: apply identical steps at once; the result is the same.
    """

    def __init__(
        self,
        replica: Replica,
        engine: EngineName,
        model: StepModel,
        *,
        num_blocks: int,
        block_size: int,
        layout: KVLayout | None = None,
        slowdown: float = 1.0,
        seed: int = 0,
        fast_forward: bool = True,
    ) -> None:
        self.model = model
        self.clock = VirtualClock()
        self.inbox = TraceInbox(self.clock, ())
        self.executor = ModelExecutor(self.clock, model, replica, slowdown, seed)
        kv = KVCacheManager(num_blocks, block_size, prefix_caching=replica.enable_prefix_caching, layout=layout)
        self.scheduler = Scheduler(
            kv,
            _limits(replica, engine),
            relay=self.executor.relay,
            num_stages=model.num_stages,
            propose=_Proposer(replica.draft_tokens) if replica.draft_tokens else None,
        )
        self.core = EngineCore(self.scheduler, self.executor, self.clock, self.inbox)
        self.short_of_memory = 0  # steps in which a seat was free, but no block for who waited
        self._fast_forward = fast_forward
        self._run: FastForward | None = None

    @property
    def next_s(self) -> float:
        """When it acts next; infinity: not before it hears of another request."""
        due_s = self.inbox.next_time()
        if self._run is not None:
            return self._run.cut_s(due_s)
        if self.core.is_working:
            return self.clock.now()
        return math.inf if due_s is None else max(due_s, self.clock.now())

    def advance(self, until_s: float, on_run: OnRun, on_first_token: OnFirstToken) -> list[TokenOutput]:
        """Do one round of the engine's loop, or several that are alike as far as `until_s`: `on_run` gets theirs."""
        next_s = self.inbox.next_time()
        due_s = math.inf if next_s is None else next_s
        is_new = (
            self._run is None
            and self._fast_forward
            and due_s > self.clock.now()
            and (rounds := steady_rounds(self.core)) > 0
        )
        if is_new:
            self._run = FastForward(self.core, self.executor, rounds)
        if self._run is None:
            outputs = self.core.step()
            self._count_shortage()
            return outputs
        if self._run.left and self._run.now_s < due_s:
            self._run.extend(min(until_s, due_s))
            if is_new and self._run.known_s:
                self._report_first_tokens(on_first_token)
            return []
        return self._finish_run(due_s, on_run)

    def settle(self, time_s: float, on_run: OnRun) -> list[TokenOutput]:
        """Do the foreseen rounds that begin before a time until which nothing acts, so that `load` is of that time."""
        return [] if self._run is None else self._finish_run(time_s, on_run)

    @property
    def load(self) -> ReplicaLoad:
        """What its metrics would report."""
        return ReplicaLoad(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            kv_usage=self.scheduler.kv.usage().share,
        )

    def _finish_run(self, due_s: float, on_run: OnRun) -> list[TokenOutput]:
        if self._run is None:
            return []
        # Nothing acts before `now_s` any more, so nothing can come that would have cut it shorter.
        running = len(self.scheduler.running)
        rounds, outputs = self._run.finish(self.core, due_s, on_run)
        self._run = None
        if rounds:
            self._count_shortage()
            self.short_of_memory += (rounds - 1) * self._is_short(running, running)
        return outputs

    def _report_first_tokens(self, on_first_token: OnFirstToken) -> None:
        """Of requests whose prompt ends in the first of the foreseen rounds, or ended in the step before (overlap)."""
        running = self.scheduler.running
        for r in running:
            if not r.num_output and self._run is not None:
                on_first_token(r, self._run.known_s[0], len(running))

    def _count_shortage(self) -> None:
        self.short_of_memory += self._is_short(len(self.scheduler.running), self.executor.last_tokens)

    def _is_short(self, running: int, tokens: int) -> bool:
        """Whether a step of so many tokens had a seat and tokens left for who waits, but no blocks."""
        limits = self.scheduler.limits
        has_room = running < limits.max_num_seqs and tokens < limits.max_num_batched_tokens
        return bool(self.scheduler.waiting) and has_room


def _limits(replica: Replica, engine: EngineName) -> SchedulerLimits:
    queue = (
        {}
        if ENGINE_PRIORS[engine].limits_queue
        else {"max_num_queued_reqs": _NO_LIMIT, "max_num_queued_tokens": _NO_LIMIT}
    )
    return SchedulerLimits(
        max_model_len=replica.max_model_len,
        max_num_seqs=replica.max_num_seqs,
        max_num_batched_tokens=replica.max_num_batched_tokens,
        long_prefill_token_threshold=replica.long_prefill_token_threshold,
        **queue,
    )


class _Proposer:
    """Always as many drafts; whether they are any good is the executor's to say."""

    def __init__(self, num_drafts: int) -> None:
        self._drafts = [_DRAFT] * num_drafts

    def __call__(self, _request: Request) -> list[int]:
        return list(self._drafts)
