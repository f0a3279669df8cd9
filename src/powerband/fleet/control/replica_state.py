"""What a controller knows of a member beyond what the target tells: since when it is ready, silent, draining."""

from __future__ import annotations

from dataclasses import dataclass

from powerband.fleet.control.probes import ProbeResult
from powerband.fleet.control.rollout import ReplicaView
from powerband.fleet.service.spec import Policy
from powerband.fleet.targets.base import Instance

MAX_MISSED_PROBES = 3  # in a row, before a member counts as hung
GATEWAY_START_TIMEOUT_S = 30.0  # for a gateway to become ready: it loads no weights
_HEALTHY_FOR_S = 2.0


@dataclass(slots=True)
class ReplicaState:
    """Times on the controller's clock. restarts: of its place. leaving: it was asked to end, its death is no loss.
    condemned: it is to be replaced. vacated: its place has been given away.
    """

    running: Instance
    seen_s: float
    ready_s: float | None = None
    draining_s: float | None = None
    restarts: int = 0
    note: str = ""
    leaving: bool = False
    condemned: bool = False
    vacated: bool = False

    def look(self, sight: ProbeResult, now_s: float) -> bool:
        """True when it has become ready since the last look."""
        self.note = sight.says
        if sight.ready_s is None or self.ready_s is not None or self.running.stopping:
            return False
        self.ready_s = now_s
        return True

    def is_well(self, sight: ProbeResult, now_s: float) -> bool:
        """Ready, and said so a moment ago."""
        return self.ready_s is not None and now_s - max(sight.ready_s or 0.0, self.seen_s) < _HEALTHY_FOR_S

    def is_hung(self, sight: ProbeResult, policy: Policy, now_s: float) -> bool:
        """Silent for long, not ready for very long, or never ready in time.

        One that does not listen yet, or no more, may be starting or ending. One that takes connections and answers none
        of them is hung in any phase, also where this controller has never seen it well.
        """
        silent_s = now_s - max(sight.heard_s or 0.0, self.seen_s)
        if sight.unanswered >= MAX_MISSED_PROBES and silent_s > policy.hung_s:
            return True
        if self.running.stopping:
            return False
        if self.ready_s is None:
            return now_s - self.seen_s > (GATEWAY_START_TIMEOUT_S if self.running.role == "gateway" else policy.ready_s)
        unready_s = now_s - max(sight.ready_s or 0.0, self.seen_s)
        if sight.silences:
            return sight.silences >= MAX_MISSED_PROBES and silent_s > policy.hung_s
        return unready_s > policy.unready_s

    def member(self, sight: ProbeResult, policy: Policy, now_s: float, *, set_aside: bool, empty: bool) -> ReplicaView:
        """As rollout.next_moves wants it. empty: nothing is left there."""
        is_late = self.draining_s is not None and now_s - self.draining_s > policy.drain_s
        return ReplicaView(
            id=self.running.id,
            number=int(self.running.id.removeprefix("r")),
            pool=self.running.pool,
            revision=self.running.revision,
            state="stopping" if self.running.stopping else "starting" if self.ready_s is None else "ready",
            well=self.is_well(sight, now_s),
            set_aside=set_aside,
            hung=self.is_hung(sight, policy, now_s),
            condemned=self.condemned,
            draining=self.draining_s is not None,
            empty=self.draining_s is not None and (empty or is_late),
        )
