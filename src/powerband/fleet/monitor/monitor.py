"""Watches over a promise: about once a second it is shown what happened, keeps incidents, and says what to do.

    records, snapshots, /metrics, host ──► scene ──► findings ──► incidents ──► actions, suggested
                                           attainment, residuals       └──────► webhook, `powerband incidents`

It does nothing itself and reads no clock, so that a test bed can play hours of faults in a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from powerband.fleet.monitor.expected import Expectation
from powerband.fleet.monitor.incidents import ActionKind, Incident, Incidents
from powerband.fleet.monitor.observation import Observation
from powerband.fleet.monitor.replica_checks import check_replicas
from powerband.fleet.monitor.service_checks import check_service
from powerband.fleet.monitor.slo_burn import WINDOWS_S
from powerband.fleet.monitor.state import RECENT_S, MonitorState

_REPEAT_S = 120.0  # until something is suggested again for an incident that goes on
_PAUSE_S = 30.0  # between actions that take a replica away
_TAKES_AWAY = ("eject_replica", "restart_replica")


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """What would help. replica: its id, where it is about one. Whether it is done is the controller's to decide."""

    kind: ActionKind
    incident: str
    why: str
    replica: str = ""


class Monitor:
    """incidents: kept through restarts; what the watcher has learned is not."""

    def __init__(self, expected: Expectation, incidents: Incidents | None = None) -> None:
        self.incidents = incidents or Incidents()
        self._scene = MonitorState.of(expected)
        self._looked_s: float | None = None
        self._suggested_s: dict[str, float] = {}
        self._took_away_s: float | None = None

    def observe(self, seen: Observation) -> list[Action]:
        """What should be done now. With `--auto`, the controller does it and tells `done`."""
        scene = self._scene
        scene.see(seen)
        replicas = check_replicas(scene)
        self.incidents.update(seen.now_s, [*replicas, *check_service(scene, replicas)])
        if not self.incidents.open:
            scene.learn(seen.clock_s - self._looked_s if self._looked_s is not None else 1.0)
        self._looked_s = seen.clock_s
        open_ids = {incident.id for incident in self.incidents.open}
        self._suggested_s = {one: time_s for one, time_s in self._suggested_s.items() if one in open_ids}
        return [action for incident in self.incidents.open if (action := self._action(incident, seen.clock_s))]

    def done(self, action: Action, outcome: str) -> None:
        """The controller did something about an incident: a sentence."""
        self.incidents.note(action.incident, outcome)

    def expect(self, expected: Expectation) -> None:
        """Another plan is in force: what was counted against the one before is forgotten. Incidents stay."""
        if expected != self._scene.expected:
            self._scene = MonitorState.of(expected)

    def report(self) -> dict[str, Any]:
        """Figures for `powerband status`: attainment by window, load beside the plan, residuals. Plain values."""
        scene = self._scene
        windows = {}
        for window_s in WINDOWS_S:
            share = scene.attainment.over(scene.clock_s, window_s)
            burn = scene.attainment.burn(scene.clock_s, window_s)
            windows[str(window_s)] = {"requests": share.total, "attainment": share.attainment, "burn": burn}
        return {
            "promised_attainment": scene.expected.slo.attainment,
            "windows": windows,
            "rate": scene.rate(),
            "promised_rate": scene.expected.rate,
            "figures": scene.lately.figures(scene.clock_s, RECENT_S),
            "predicted": {name: banded.value for name, banded in scene.expected.predicted.items()},
            "residual_ratio": dict(scene.residuals.latest),
            "open_incidents": [incident.id for incident in self.incidents.open],
        }

    def _action(self, incident: Incident, clock_s: float) -> Action | None:
        if incident.action == "none" or clock_s - self._suggested_s.get(incident.id, -_REPEAT_S) < _REPEAT_S:
            return None
        if incident.action in _TAKES_AWAY:
            # One at a time, and never the last one that works.
            is_soon = self._took_away_s is not None and clock_s - self._took_away_s < _PAUSE_S
            others = [one for one in self._scene.replicas if one.id != incident.subject and one.state == "ready"]
            # What fails or is slow under too much load would be so elsewhere, and is missed while it is replaced.
            is_strained = any(one.cause == "load" for one in self.incidents.open)
            is_strained = is_strained and incident.cause in ("errors", "slow_replica")
            if is_soon or is_strained or (incident.action == "eject_replica" and not others):
                return None
            self._took_away_s = clock_s
        self._suggested_s[incident.id] = clock_s
        replica = incident.subject if incident.kind == "replica" else ""
        return Action(kind=incident.action, incident=incident.id, why=incident.what, replica=replica)
