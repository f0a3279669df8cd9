"""Feeds the monitor with the controller's observations, about once a second, and executes its actions if allowed."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from powerband.errors import PowerbandError, UsageError
from powerband.fleet.control.gateway_client import GatewaySnapshot
from powerband.fleet.control.instance_specs import excess_threads
from powerband.fleet.control.instance_state import InstanceState
from powerband.fleet.monitor.incidents import Incidents
from powerband.fleet.monitor.monitor import Action, Monitor
from powerband.fleet.monitor.state import Observation, SLOTarget, read_host_load
from powerband.fleet.service.spec import Release
from powerband.fleet.service.store import ServiceStore
from powerband.gateway.request import CompletedRequest
from powerband.spec.plan import Prediction
from powerband.spec.yaml_codec import read_record

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
_MAX_SNAPSHOT_AGE_S = 5.0  # an older one counts as none: the gateway does not respond


class Remediator:
    """incidents: None: kept in memory only."""

    def __init__(self, store: ServiceStore, incidents: Incidents | None) -> None:
        self._store = store
        self._incidents = incidents
        self._monitor: Monitor | None = None
        self._release: Release | None = None
        self._observed_s = -INTERVAL_S
        self._completed: list[CompletedRequest] = []
        self._crashes: list[str] = []

    def run(
        self,
        release: Release,
        completed: Sequence[CompletedRequest],
        crashes: Sequence[str],
        snapshot: GatewaySnapshot | None,
        instances: Mapping[str, InstanceState],
        *,
        allowed: bool,
        has_room: Callable[[Release], bool],
        now_s: float,
    ) -> None:
        """crashes: since the last call, a sentence each. allowed: execute the actions, instead of only suggesting them.
        has_room: whether one more replica fits.
        now_s: time.monotonic().
        """
        self._completed += completed
        self._crashes += crashes
        if now_s - self._observed_s < INTERVAL_S:
            return
        self._observed_s = now_s
        monitor = self._monitor_of(release)
        is_recent = snapshot is not None and now_s - snapshot.taken_s < _MAX_SNAPSHOT_AGE_S
        observation = Observation(
            now_s=time.time(),
            clock_s=now_s,
            completed=tuple(self._completed),
            crashes=tuple(self._crashes),
            pools=snapshot.pools if snapshot is not None and is_recent else None,
            metrics={id: state.probe.metrics for id, state in instances.items() if state.probe.metrics},
            host=read_host_load(),
        )
        self._completed, self._crashes = [], []
        for action in monitor.observe(observation):
            if allowed and action.kind != "replan":
                self._execute(action, snapshot, instances, has_room)

    def open_incidents(self) -> tuple[str, ...]:
        """Each open incident in a sentence."""
        if self._monitor is None:
            return ()
        return tuple(f"{one.id} {one.what} {one.advice}".strip() for one in self._monitor.incidents.open)

    def report(self) -> dict[str, Any]:
        """Monitor.report(); {} before the first observation."""
        return self._monitor.report() if self._monitor is not None else {}

    def _monitor_of(self, release: Release) -> Monitor:
        if self._monitor is None:
            self._monitor = Monitor(slo_target(release), self._incidents)
        elif release is not self._release:
            self._monitor.set_target(slo_target(release))
        self._release = release
        return self._monitor

    def _execute(
        self,
        action: Action,
        snapshot: GatewaySnapshot | None,
        instances: Mapping[str, InstanceState],
        has_room: Callable[[Release], bool],
    ) -> None:
        try:
            if action.kind == "add_replica":
                outcome = self._add_replica(snapshot, instances, has_room)
            elif action.replica in instances:
                instances[action.replica].pending_replacement = True
                outcome = f"{action.replica} is being drained and replaced"
            else:
                raise UsageError(f"{action.replica} has exited.")
        except PowerbandError as error:
            outcome = f"could not {action.kind.replace('_', ' ')}: {error.message}"
        logger.info("%s: %s: %s", action.incident, action.reason, outcome)
        if self._monitor is not None:
            self._monitor.record_action(action, outcome)

    def _add_replica(
        self,
        snapshot: GatewaySnapshot | None,
        instances: Mapping[str, InstanceState],
        has_room: Callable[[Release], bool],
    ) -> str:
        """Returns what was done. Raises PowerbandError if that is not possible now."""
        with self._store.lock_spec(wait_s=0.0):  # a tick never blocks; the monitor will suggest the action again
            spec = self._store.read_spec()
            if spec is None or spec.removed or not has_room(spec.release):
                raise UsageError("There is no room for one more replica here.")
            if excess_threads(with_one_more(spec.release, {})):
                raise UsageError("All cores of this machine are in use already.")
            load: Counter[int] = Counter()
            for state in instances.values():
                replica = snapshot.replica(state.id) if snapshot is not None else None
                load[state.pool] += replica.inflight if replica is not None else 0
            release = with_one_more(spec.release, load)
            self._store.write_spec(spec.updated(release=release, previous=spec.release))
        return f"one more replica: {' + '.join(map(str, release.counts))}"


def slo_target(release: Release) -> SLOTarget:
    """The target from the release's plan. Does not need the trace that the plan was made from."""
    predicted = {
        name: read_record(Prediction, figure, f"plan: predicted: {name}")
        for name, figure in release.plan.get("predicted", {}).items()
    }
    return SLOTarget(slo=release.slo, rate=release.plan["promise"]["rate"], predicted=predicted)


def with_one_more(release: Release, load: Mapping[int, int]) -> Release:
    """One more replica in the pool with the most requests per replica. load: requests in flight by pool."""
    busiest = max(range(len(release.pools)), key=lambda index: load.get(index, 0) / release.pools[index].count)
    return release.with_counts([count + (index == busiest) for index, count in enumerate(release.counts)])
