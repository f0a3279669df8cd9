"""Monitors a service's SLO: observes it about once a second, keeps incidents, and suggests actions.

    requests, snapshots, /metrics, host ──► state ──► checks ──► incidents ──► suggested actions
                                       SLO burn, residuals           └───────► webhook, `powerband incidents`

It carries out nothing itself and reads no clock, so that a test can simulate hours of faults in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from powerband.fleet.monitor.checks import check_crashes, check_replicas, check_service
from powerband.fleet.monitor.incidents import ActionKind, Incident, Incidents
from powerband.fleet.monitor.slo_burn import WINDOWS_S
from powerband.fleet.monitor.state import RECENT_S, MonitorState, Observation, SLOTarget

_REPEAT_S = 120.0  # until the same action is suggested again for an open incident
_DISRUPTION_INTERVAL_S = 30.0  # between actions that take a replica out of service
_DISRUPTIVE = ("eject_replica", "restart_replica")


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """A suggested action. The controller decides whether to execute it."""

    kind: ActionKind
    incident: str
    reason: str
    replica: str = ""  # the replica's id, if the action is about one


class Monitor:
    """incidents: kept across restarts, unlike everything else that the monitor has learned."""

    def __init__(self, target: SLOTarget, incidents: Incidents | None = None) -> None:
        self.incidents = incidents or Incidents()
        self._state = MonitorState.for_target(target)
        self._observed_s: float | None = None
        self._suggested_s: dict[str, float] = {}  # by incident
        self._disrupted_s: float | None = None

    def observe(self, observation: Observation) -> list[Action]:
        """Returns the actions that should be carried out now. The caller reports each with `record_action`."""
        state = self._state
        state.observe(observation)
        of_replicas = check_replicas(state)
        findings = [*of_replicas, *check_service(state, of_replicas), *check_crashes(observation.crashes)]
        self.incidents.update(observation.now_s, findings)
        if not self.incidents.open:
            state.update_baseline(observation.clock_s - self._observed_s if self._observed_s is not None else 1.0)
        self._observed_s = observation.clock_s
        open_ids = {incident.id for incident in self.incidents.open}
        self._suggested_s = {one: time_s for one, time_s in self._suggested_s.items() if one in open_ids}
        found = [self._action(incident, observation.clock_s) for incident in self.incidents.open]
        return [action for action in found if action is not None]

    def record_action(self, action: Action, outcome: str) -> None:
        """outcome: what was done, in a sentence."""
        self.incidents.record_action(action.incident, outcome)

    def set_target(self, target: SLOTarget) -> None:
        """Switch to another plan: drop the counts against the previous one. Incidents stay."""
        if target != self._state.target:
            self._state = MonitorState.for_target(target)

    def report(self) -> dict[str, Any]:
        """Figures for `powerband status`: attainment by window, load beside the plan's, residuals. Plain values."""
        state = self._state
        windows = {}
        for window_s in WINDOWS_S:
            counts = state.burn.window(state.clock_s, window_s)
            burn_rate = state.burn.burn_rate(state.clock_s, window_s)
            windows[str(window_s)] = {"requests": counts.total, "attainment": counts.attainment, "burn": burn_rate}
        return {
            "promised_attainment": state.target.slo.attainment,
            "windows": windows,
            "rate": state.arrival_rate(),
            "promised_rate": state.target.rate,
            "figures": state.traffic.figures(state.clock_s, RECENT_S),
            "predicted": {name: banded.value for name, banded in state.target.predicted.items()},
            "residual_ratio": dict(state.residuals.latest_ratio),
            "open_incidents": [incident.id for incident in self.incidents.open],
        }

    def _action(self, incident: Incident, clock_s: float) -> Action | None:
        if incident.action == "none" or clock_s - self._suggested_s.get(incident.id, -_REPEAT_S) < _REPEAT_S:
            return None
        if incident.action in _DISRUPTIVE:
            if not self._may_disrupt(incident, clock_s):
                return None
            self._disrupted_s = clock_s
        self._suggested_s[incident.id] = clock_s
        replica = incident.subject if incident.kind == "replica" else ""
        return Action(kind=incident.action, incident=incident.id, reason=incident.what, replica=replica)

    def _may_disrupt(self, incident: Incident, clock_s: float) -> bool:
        """Whether a replica may be taken out of service: one at a time, and never the last ready one."""
        if self._disrupted_s is not None and clock_s - self._disrupted_s < _DISRUPTION_INTERVAL_S:
            return False
        # In an overload, any replica fails or is slow, and taking one out of service reduces capacity.
        if incident.cause in ("errors", "slow_replica") and any(one.cause == "load" for one in self.incidents.open):
            return False
        others = [one for one in self._state.replicas if one.id != incident.subject and one.state == "ready"]
        return incident.action != "eject_replica" or bool(others)
