"""The engine in virtual time: the same scheduler and loop, with a latency model in place of a device.

clock = VirtualClock()
executor = SimExecutor(clock, latency_s=lambda step: 0.01 + 1e-4 * step.num_tokens)
core = EngineCore(scheduler, executor, clock, TraceInbox(clock, [(0.0, Add(request))]))
outputs = run_to_end(core)
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

from powerband.core.clock import Clock
from powerband.core.loop import Command, EngineCore
from powerband.core.step import DeviceReport, Step, StepResult, TokenOutput, Work


class TraceInbox:
    """Commands that are due at given times; of those due at once, the one given first is first."""

    def __init__(self, clock: Clock, events: Iterable[tuple[float, Command]]) -> None:
        self.clock = clock
        self._events: list[tuple[float, int, Command]] = []
        self._num_sent = 0
        for at_s, command in events:
            self.send(at_s, command)

    def send(self, at_s: float, command: Command) -> None:
        """Add a command, also while the simulation runs: clients that react to responses."""
        heapq.heappush(self._events, (at_s, self._num_sent, command))
        self._num_sent += 1

    def poll(self, now: float) -> list[Command]:
        due: list[Command] = []
        while self._events and self._events[0][0] <= now:
            due.append(heapq.heappop(self._events)[2])
        return due

    def next_time(self) -> float | None:
        return self._events[0][0] if self._events else None

    def wait(self, until: float | None) -> None:
        if until is not None:
            self.clock.wait_until(until)


class SimHandle:
    """A step that ends at a known time."""

    def __init__(self, executor: SimExecutor, end_s: float, result: StepResult) -> None:
        self._executor = executor
        self.end_s = end_s
        self._result = result

    def result(self) -> StepResult:
        clock = self._executor.clock
        clock.wait_until(self.end_s)
        clock.wait_until(clock.now() + self._executor.update_s)
        return self._result


class SimExecutor:
    """Runs nothing; takes as long as `latency_s(step)` says, spread evenly over the pipeline's stages.

    `submit_s`, `update_s`: the host's own time before a step is launched and after its result is there.
    `sample(work)`: the tokens a work yields; by default one zero, which rejects any draft.
    """

    def __init__(
        self,
        clock: Clock,
        latency_s: Callable[[Step], float],
        *,
        num_stages: int = 1,
        overlap: bool = False,
        submit_s: float = 0.0,
        update_s: float = 0.0,
        sample: Callable[[Work], list[int]] | None = None,
    ) -> None:
        self.clock = clock
        self.latency_s = latency_s
        self.depth = num_stages + (overlap or num_stages > 1)
        self.relay = int(overlap and num_stages == 1)
        self.submit_s = submit_s
        self.update_s = update_s
        self.sample = sample or _zero
        self._stage_free_s = [0.0] * num_stages

    def start(self) -> DeviceReport:
        return DeviceReport("simulated", "latency model", 0)

    def init_kv_cache(self, num_blocks: int) -> None:
        """Nothing to allocate."""

    def submit(self, step: Step) -> SimHandle:
        self.clock.wait_until(self.clock.now() + self.submit_s)
        end_s = self.clock.now()
        stage_s = self.latency_s(step) / len(self._stage_free_s)
        for i, free_s in enumerate(self._stage_free_s):
            end_s = max(end_s, free_s) + stage_s
            self._stage_free_s[i] = end_s
        return SimHandle(self, end_s, self.run(step))

    def run(self, step: Step) -> StepResult:
        """What the step yields."""
        return StepResult({work.id: self.sample(work) for work in step.works if work.samples})

    def check(self) -> None:
        """A simulated device does not break."""


def run_to_end(core: EngineCore) -> list[TokenOutput]:
    """Step until the trace is exhausted and every request has ended; return all outputs in order."""
    outputs: list[TokenOutput] = []
    while core.busy:
        outputs += core.step()
    return outputs


def _zero(_work: Work) -> list[int]:
    return [0]
