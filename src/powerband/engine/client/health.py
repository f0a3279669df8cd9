"""Whether an engine makes progress, judged from its heartbeats and from its loop, never from its reachability."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from powerband.engine.client.messages import Heartbeat


class EngineState(str, Enum):
    STARTING = "starting"
    READY = "ready"
    STALLED = "stalled"  # alive, but no heartbeat, or a step that does not end
    DEAD = "dead"  # ended; it is being started again
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class StallLimits:
    """How long each kind of silence may last, in seconds."""

    tick_s: float = 0.25  # how often to look
    heartbeat_s: float = 2.0  # no heartbeat: not ready, streams end
    idle_s: float = 2.0  # the idle loop does not advance: not ready
    step_s: float = 60.0  # one step takes this long: not ready
    silent_s: float = 5.0  # not a heartbeat for this long, or for as long as its start took if that is more, …
    hopeless_s: float = 60.0  # … but at most for this long, or a step this much over `step_s`: kill and restart


@dataclass(frozen=True, slots=True)
class EngineHealth:
    state: EngineState
    reason: str  # a sentence; empty when ready
    steps: int
    heartbeat_age_s: float

    @property
    def ready(self) -> bool:
        return self.state is EngineState.READY


class HealthMonitor:
    """Turns heartbeats and ticks of its owner into a state.

    Silence is counted in ticks, not on the clock: after a machine slept, or its owner was held up itself, the engine
    is not blamed for the gap.
    """

    def __init__(self, limits: StallLimits) -> None:
        self._limits = limits
        self._state = EngineState.STARTING
        self._reason = "The engine is starting."
        self._silent_ticks = 0
        self._start_s = 0.0
        self._last: Heartbeat | None = None

    def started(self, start_s: float = 0.0) -> None:
        """start_s: seconds that the start took. Waiting for a silent engine costs no more than starting another."""
        self._state, self._reason, self._silent_ticks = EngineState.READY, "", 0
        self._start_s = start_s

    def ended(self, state: EngineState, reason: str) -> None:
        self._state, self._reason = state, reason

    def on_heartbeat(self, heartbeat: Heartbeat) -> None:
        self._silent_ticks = 0
        self._last = heartbeat

    def tick(self) -> None:
        self._silent_ticks += 1

    @property
    def silence_s(self) -> float:
        return self._silent_ticks * self._limits.tick_s

    @property
    def hopeless(self) -> bool:
        limits = self._limits
        silent_s = min(max(limits.silent_s, self._start_s), limits.hopeless_s)
        return self.silence_s > silent_s or self._loop_age_s > limits.step_s + limits.hopeless_s

    @property
    def _loop_age_s(self) -> float:
        """Seconds since the loop last ran, at the time of the last heartbeat."""
        return self._last.sent_s - self._last.loop_s if self._last else 0.0

    def health(self) -> EngineHealth:
        steps = self._last.stats.num_steps if self._last else 0
        state, reason = self._state, self._reason
        if state is EngineState.READY and (stall := self._stall()):
            state, reason = EngineState.STALLED, stall
        return EngineHealth(state, reason, steps, self.silence_s)

    def _stall(self) -> str:
        if self.silence_s > self._limits.heartbeat_s:
            return f"The engine's process has been silent for {self.silence_s:.1f} s."
        if self._last is None:
            return ""
        loop_age_s = self._loop_age_s
        limit_s = self._limits.step_s if self._last.busy else self._limits.idle_s
        if loop_age_s > limit_s:
            where = "in a step" if self._last.busy else "while idle"
            return f"The engine's loop has not advanced for {loop_age_s:.1f} s ({where})."
        return ""
