"""The only engine loop. With a real executor it serves; with a latency model and a virtual clock it simulates.

mode                    depth   relay   what differs
synchronous             1       0       schedule, run, update
overlap                 2       1       the CPU updates step k-1 and schedules k+1 while the device runs k
pipeline of S stages    S + 1   0       different requests fill different stages
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from powerband.core.clock import Clock
from powerband.core.kv_cache import CacheUsage
from powerband.core.request import EngineRequest
from powerband.core.scheduler import Scheduler
from powerband.core.step import ErrorInfo, Executor, FinishReason, Step, StepHandle, StepResult, TokenOutput
from powerband.errors import EngineDead, PowerbandError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Add:
    """Serve this request. A refusal comes back as its only output."""

    request: EngineRequest


@dataclass(frozen=True, slots=True)
class Abort:
    """End this request now. Its last output carries `reason`; an id that is not live is ignored.

    `reason` is STOP when the sender found a stop string, ABORT when the client has left.
    """

    id: str
    reason: FinishReason = FinishReason.ABORT


@dataclass(frozen=True, slots=True)
class Call:
    """Run `function` between two steps: administration (pause, reset, stats). It must not raise."""

    function: Callable[[], None]


Command = Add | Abort | Call


class Inbox(Protocol):
    """Where commands come from: a trace, or a thread or process that fills it while the loop runs."""

    def poll(self, now: float) -> list[Command]:
        """Return the commands due by `now`, in order, without waiting."""
        ...

    def next_time(self) -> float | None:
        """When the next command is due, if that is known (a trace knows; a live inbox returns None)."""
        ...

    def wait(self, until: float | None) -> None:
        """The engine is idle: return when `poll` has something, or at the clock's `until`. It may return early.

        A live inbox blocks here on its queue or socket, so that a command wakes the loop at once; with `until` None
        it may block for as long as nothing comes.
        """
        ...


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A finished step, for the step log and the metrics. Times on the engine's clock."""

    step: Step
    result: StepResult | None  # None: the whole step failed
    submitted_s: float
    finished_s: float
    exclusive_s: float  # from submission, or the end of the step before if later, to the result
    usage: CacheUsage

    @property
    def seconds(self) -> float:
        """From submission to result; steps in flight together overlap."""
        return self.finished_s - self.submitted_s


@dataclass(slots=True)
class InFlight:
    step: Step
    handle: StepHandle
    submitted_s: float


class EngineCore:
    """Commands in, steps out to the executor, results back in, outputs out. One thread owns it."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        clock: Clock,
        inbox: Inbox,
        observer: Callable[[StepRecord], None] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.clock = clock
        self.inbox = inbox
        self.observer = observer
        self.inflight: deque[InFlight] = deque()
        self._last_finished_s = clock.now()

    @property
    def is_working(self) -> bool:
        """Whether there is something to do now, without a further command."""
        return bool(self.inflight) or bool(self.scheduler.requests and not self.scheduler.paused)

    @property
    def busy(self) -> bool:
        """Whether there is, or will be, something to do without a further live command."""
        return self.is_working or self.inbox.next_time() is not None

    def step(self) -> list[TokenOutput]:
        """Do one round; wait only if there is nothing to do. Raises EngineDead when the device cannot go on."""
        now = self.clock.now()
        outputs: list[TokenOutput] = []
        for command in self.inbox.poll(now):
            outputs += self._apply(command, now)
        step = self.scheduler.schedule(now)
        if step is not None:
            outputs += self._submit(step)
        if self.inflight and (step is None or len(self.inflight) >= self.executor.depth):
            outputs += self._finish_oldest()
        elif step is None and not outputs:
            self.inbox.wait(self.inbox.next_time())
        return outputs

    def _apply(self, command: Command, now: float) -> list[TokenOutput]:
        match command:
            case Add(request):
                try:
                    self.scheduler.add(request, now)
                except Exception as error:  # an invalid request must fail alone
                    return [TokenOutput(request.id, [], now, FinishReason.ERROR, error=error_info(error))]
            case Abort(id, reason):
                output = self.scheduler.abort(id, reason, now)
                return [] if output is None else [output]
            case Call(function):
                function()
        return []

    def _submit(self, step: Step) -> list[TokenOutput]:
        submitted_s = self.clock.now()
        try:
            handle = self.executor.submit(step)
        except Exception as error:
            return self._step_failed(step, submitted_s, error)
        self.inflight.append(InFlight(step, handle, submitted_s))
        return []

    def _finish_oldest(self) -> list[TokenOutput]:
        oldest = self.inflight.popleft()
        try:
            result = oldest.handle.result()
        except Exception as error:
            return self._step_failed(oldest.step, oldest.submitted_s, error)
        now = self.clock.now()
        outputs = self.scheduler.update(oldest.step, result, now)
        self._observe(oldest.step, result, oldest.submitted_s, now)
        return outputs

    def _step_failed(self, step: Step, submitted_s: float, error: Exception) -> list[TokenOutput]:
        """The requests of this step end with the error; the others go on, if the device can."""
        try:
            self.executor.check()
        except Exception as cause:
            raise EngineDead(f"The engine's device failed: {cause}", hint="Restart the engine.") from error
        now = self.clock.now()
        logger.error("Step %d failed; its %d requests end with an error.", step.index, len(step.works), exc_info=error)
        outputs = self.scheduler.fail(step, error_info(error), now)
        self._observe(step, None, submitted_s, now)
        return outputs

    def _observe(self, step: Step, result: StepResult | None, submitted_s: float, now: float) -> None:
        exclusive_s = now - max(submitted_s, self._last_finished_s)
        self._last_finished_s = now
        if self.observer is not None:
            self.observer(StepRecord(step, result, submitted_s, now, exclusive_s, self.scheduler.kv.usage()))


def error_info(error: Exception) -> ErrorInfo:
    """An exception as a value that crosses process boundaries."""
    if isinstance(error, PowerbandError):
        return ErrorInfo(error.code, error.message, error.hint, error.http_status, error.retry_after_s, error.param)
    return ErrorInfo("internal_error", f"{type(error).__name__}: {error}", "The engine's log says more.")
