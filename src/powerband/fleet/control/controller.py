"""The reconciliation loop: observes what runs, compares it with the service's spec, and acts, several times a second.

    desired.json ───┐                                    ┌──► target: start, stop, kill
    target ─────────┼──► observe ──► decide ──► act ─────┼──► gateway: routes
    probes, gateway ┘                                    └──► status.json

A tick never blocks. The state that the controller keeps in memory only affects timing (crash back-off, the start of a
drain), so a new controller recovers from the files, the target and the gateway.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from powerband.errors import EnvironmentFault, PowerbandError
from powerband.fleet.control.change_events import record_change
from powerband.fleet.control.crash_backoff import CrashBackoff
from powerband.fleet.control.gateway_client import GatewayClient
from powerband.fleet.control.instance_specs import (
    build_route,
    free_devices,
    gateway_revision,
    gateway_spec,
    pool_revisions,
    release_revision,
    replica_key,
    replica_spec,
)
from powerband.fleet.control.instance_state import InstanceState
from powerband.fleet.control.probes import HealthProber
from powerband.fleet.control.remediation import Remediator
from powerband.fleet.control.rollout import Actions, DesiredReplicas, next_actions
from powerband.fleet.control.shared_gateway import SharedGateway
from powerband.fleet.control.slo_counter import SLOCounter
from powerband.fleet.control.status import replica_status, service_phase
from powerband.fleet.monitor.events import Events
from powerband.fleet.monitor.incidents import Incidents
from powerband.fleet.service.spec import Release, ServiceSpec
from powerband.fleet.service.status import FailedRollout, GatewayStatus, ServiceStatus
from powerband.fleet.service.store import ServiceStore
from powerband.fleet.targets.base import ExitedInstance, Instance, Role, Target, shown_name

logger = logging.getLogger(__name__)

REPLICA_GRACE_S = 15.0  # from SIGTERM to SIGKILL
GATEWAY_GRACE_S = 45.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a tick changes. release: the release to run; None: nothing should run."""

    release: Release | None
    replicas: Actions
    kill_gateways: tuple[str, ...] = ()
    stop_gateways: tuple[str, ...] = ()
    start_gateway: bool = False


@dataclass(slots=True)
class Controller:
    """prober and gateway run in the same event loop. clock: time.monotonic(), except in tests."""

    store: ServiceStore
    target: Target
    prober: HealthProber
    gateway: GatewayClient
    clock: Callable[[], float] = time.monotonic
    incidents: Incidents | None = None  # None: kept in memory only
    events: Events = field(default_factory=Events)
    slo_counter: SLOCounter = field(default_factory=SLOCounter)
    webhook: str = ""  # as the spec had it at the last tick
    _instances: dict[str, InstanceState] = field(default_factory=dict)
    _backoff: CrashBackoff = field(default_factory=CrashBackoff)
    _generation: int = 0  # of the spec at the last tick, also of the controller before
    _spec: ServiceSpec | None = None  # as last read
    _last_ready_generation: int = 0
    _failed: FailedRollout | None = None
    _open_places: list[int] = field(default_factory=list)  # restart counts for the replicas to start as replacements
    _gateway_restarts: int = 0
    _notes: list[str] = field(default_factory=list)  # of this tick
    _failed_starts: set[str] = field(default_factory=set)  # reasons that have been events since the last change
    _crashes: list[str] = field(default_factory=list)  # since the last observation by the monitor, one sentence each
    _shared: SharedGateway | None = None  # instead of a gateway of this service
    _shared_pid: int = 0  # as the controller before knew it
    _remediator: Remediator = field(init=False)

    def __post_init__(self) -> None:
        self._remediator = Remediator(self.store, self.incidents)

    def recover(self) -> None:
        """Continue where another controller stopped. Instances that were ready count as ready."""
        status = self.store.read_status()
        self.events.record("ControllerStarted", "controller", f"pid {os.getpid()}")
        if status is None:
            if self.store.has_status():
                self.store.set_aside("status.json")
            return
        self._generation = status.generation
        self._last_ready_generation, self._failed = status.last_ready_generation, status.failed_rollout
        self._gateway_restarts, self._shared_pid = status.gateway.restarts, status.gateway.pid
        self.slo_counter.resume(status.load)
        self.gateway.url, self.gateway.next_record = status.gateway.url, status.load.next_record
        now_s = self.clock()
        replicas = {replica.id: replica for replica in status.replicas}
        for instance in self.target.list_instances():
            state = InstanceState(instance=instance, first_seen_s=now_s, exit_expected=instance.stopping)
            self._instances[instance.id] = state
            if instance.id in replicas:
                state.restarts = replicas[instance.id].restarts
                state.ready_s = now_s if replicas[instance.id].ready_at is not None else None
            elif instance.role == "gateway" and instance.pid == status.gateway.pid:
                state.ready_s = now_s if status.gateway.ready_at is not None else None
        for exited in self.target.take_exited():
            if exited.exit_expected:
                continue
            known = replicas.get(exited.id, status.gateway)
            self._record_crash(exited, was_ready=known.ready_at is not None)
            if exited.id in replicas:
                self._open_places.append(replicas[exited.id].restarts + 1)
            elif exited.id.startswith("gateway-"):
                self._gateway_restarts += 1

    def tick(self) -> bool:
        """One pass of the loop. False: the service was removed, and none of its instances runs any more."""
        spec = self._read_spec()
        if spec is None:
            return False
        now_s = self.clock()
        self._observe(spec, now_s)
        decision = self._decide(spec, now_s)
        self._act(spec, decision, now_s)
        return self._report(spec, decision, now_s).phase != "removed"

    def _read_spec(self) -> ServiceSpec | None:
        """The desired state. A damaged file is replaced by the last one that was read. Raises EnvironmentFault."""
        try:
            return self.store.read_spec()
        except EnvironmentFault as problem:
            if self._spec is None:
                raise
            logger.warning("%s", problem)
            with self.store.lock_spec(wait_s=0.0):
                self.store.set_aside("desired.json")
                self.store.write_spec(self._spec)
            return self._spec

    # ---- observe

    def _observe(self, spec: ServiceSpec, now_s: float) -> None:
        """Update which instances run, exited, became ready or hang."""
        self._notes = []
        if spec.generation != self._generation:
            record_change(self.events, self._spec, spec)
            self._generation = spec.generation
            self._backoff.reset()
            self._failed_starts.clear()
        self._spec = spec
        self.webhook = spec.policy.webhook
        self.gateway.model = spec.release.served_name
        if spec.gateway_service:
            self._shared = self._shared or SharedGateway(spec.gateway_service, self.gateway, self._shared_pid)
            self._shared.follow()
        self.prober.api_key = replica_key(spec.release.api_key_file)
        instances = self.target.list_instances()
        for exited in self.target.take_exited():
            self._record_exit(exited, now_s)
        self.prober.set_targets({instance.id: instance for instance in instances})
        for instance in instances:
            state = self._instances.setdefault(instance.id, InstanceState(instance=instance, first_seen_s=now_s))
            state.is_cordoned = instance.id in spec.drained
            state.is_idle = self._is_idle(instance.id)
            was_healthy = state.is_healthy
            if state.observe(instance, self.prober.result(instance.id), spec.policy, now_s):
                self._backoff.record_ready(instance.revision)
                self.events.record("Ready", instance.id, f"after {now_s - state.first_seen_s:.1f} s")
            self._record_engine_restarts(state)
            if was_healthy and not state.is_healthy and not instance.stopping:
                self.events.record("Unhealthy", instance.id, state.probe.note or "no response to its probes")

    def _record_engine_restarts(self, state: InstanceState) -> None:
        """A replica starts its own engine again when that ends; the replica's process goes on."""
        probe, known = state.probe, state.engine_restarts
        if probe.ready_s is None:
            return
        state.engine_restarts = probe.engine_restarts
        if known is not None and probe.engine_restarts > known:
            reason = probe.engine_exit or "Its engine ended."
            self.events.record("EngineRestarted", state.id, reason, exit_code=probe.engine_exit_code)
            self._crashes.append(f"the engine of {state.id} was restarted: {reason}")

    def _record_exit(self, exited: ExitedInstance, now_s: float) -> None:
        state = self._instances.pop(exited.id, None)
        if state is None or state.exit_expected:
            if state is not None:
                self.events.record_exit(exited, was_ready=state.ready_s is not None, was_asked=True)
            return
        if not exited.exit_expected:  # one that hung was killed, which is an event of its own
            self._record_crash(exited, was_ready=state.ready_s is not None)
        ready_for_s = None if state.ready_s is None else now_s - state.ready_s
        delay_s = self._backoff.record_crash(state.revision, exited, now_s, ready_for_s=ready_for_s)
        if delay_s:
            self.events.record("BackOff", state.instance.role, f"the next start waits {delay_s:g} s")
        if state.instance.role == "gateway":
            self._gateway_restarts += 1
        else:
            self._open_place(state)

    def _record_crash(self, exited: ExitedInstance, *, was_ready: bool) -> None:
        event = self.events.record_exit(exited, was_ready=was_ready)
        self._crashes.append(f"{event.subject} crashed: {event.message}")

    def _open_place(self, state: InstanceState) -> None:
        """Let the next replica that starts count as its replacement."""
        if not state.is_replaced:
            state.is_replaced = True
            self._open_places.append(state.restarts + 1)

    def _is_idle(self, id: str) -> bool:
        """Whether the gateway has stopped dispatching to the replica, and no request is in flight there."""
        snapshot = self.gateway.snapshot
        if snapshot is None or id not in snapshot.draining:
            return False
        replica = snapshot.replica(id)
        return replica is None or replica.inflight == 0

    def _states(self, role: Role) -> list[InstanceState]:
        return [state for state in self._instances.values() if state.instance.role == role]

    def _replicas(self) -> list[Instance]:
        return [state.instance for state in self._states("replica")]

    # ---- decide

    def _decide(self, spec: ServiceSpec, now_s: float) -> Decision:
        self._check_rollout(spec)
        release = None if spec.removed else spec.previous if self._has_failed(spec) else spec.release
        gateways = self._states("gateway")
        # The gateway goes first: as long as it runs, it may dispatch to any replica. A shared one drains them.
        if release is None and self._shared is None:
            for state in self._states("replica"):
                state.is_idle = not gateways
        revision = gateway_revision(spec.gateway)
        killed = [one.id for one in gateways if one.is_hung]
        stopped = [one.id for one in gateways if not one.is_hung and (release is None or one.revision != revision)]
        may_start = release is not None and self._shared is None and not gateways
        may_start = may_start and revision not in self._backoff.backing_off(now_s)
        return Decision(
            release=release,
            replicas=next_actions(self._desired_replicas(spec, release, now_s), self._states("replica"), now_s),
            kill_gateways=tuple(killed),
            stop_gateways=tuple(stopped),
            start_gateway=may_start,
        )

    def _check_rollout(self, spec: ServiceSpec) -> None:
        """Record that this generation has become ready, or give up a new one whose replicas do not start."""
        if spec.removed or spec.generation <= self._last_ready_generation or self._has_failed(spec):
            return
        revisions, gateway = pool_revisions(spec.release), gateway_revision(spec.gateway)
        replicas = Counter((one.pool, one.revision) for one in self._states("replica") if one.ready_s is not None)
        counts = enumerate(zip(spec.release.counts, revisions, strict=True))
        has_replicas = all(replicas[pool, revision] >= count for pool, (count, revision) in counts)
        has_gateway = any(one.revision == gateway for one in self._states("gateway") if one.ready_s is not None)
        if self._shared is not None:
            has_gateway = self._shared.status(is_removed=False).state == "ready"
        if has_replicas and has_gateway:
            self._last_ready_generation = spec.generation
            return
        for revision in (*revisions, gateway):
            exited = self._backoff.last_crash(revision)
            if exited is not None and self._backoff.is_failed(revision):
                code = "" if exited.exit_code is None else f" (exit code {exited.exit_code})"
                self._failed = FailedRollout(
                    generation=spec.generation,
                    reason=f"{shown_name(exited.id)} exited before it was ready{code}",
                    replica=exited.id,
                    log=exited.log,
                    exit_code=exited.exit_code,
                )
                self.events.record("FailedRollout", spec.name, f"generation {spec.generation}: {self._failed.reason}")
                return

    def _has_failed(self, spec: ServiceSpec) -> bool:
        return self._failed is not None and self._failed.generation == spec.generation

    def _desired_replicas(self, spec: ServiceSpec, release: Release | None, now_s: float) -> DesiredReplicas:
        timeout_s = spec.policy.drain_timeout_s
        if release is None:
            return DesiredReplicas(counts=(), revisions=(), drain_timeout_s=timeout_s)
        revisions, max_surge = pool_revisions(release), spec.policy.max_surge
        if max_surge is None:
            existing = Counter((one.pool, one.revision) for one in self._states("replica"))
            desired = Counter({(i, revisions[i]): count for i, count in enumerate(release.counts)})
            # With more replicas than desired, the surge replica exists already. As desired: none is needed.
            is_certain = existing == desired or existing.total() > desired.total()
            max_surge = 1 if is_certain or self._has_room(release) else 0
        return DesiredReplicas(
            counts=release.counts,
            revisions=revisions,
            max_surge=max_surge,
            drain_timeout_s=timeout_s,
            backing_off=self._backoff.backing_off(now_s),
        )

    def _has_room(self, release: Release) -> bool:
        has_devices = all(self._free_devices(release, pool) is not None for pool in range(len(release.counts)))
        return has_devices and self.target.has_room_for_replica()

    def _free_devices(self, release: Release, pool: int) -> tuple[int, ...] | None:
        in_use = self.target.devices_in_use() if release.gpus else frozenset[int]()
        return free_devices(release, pool, self._replicas(), in_use)

    # ---- act

    def _act(self, spec: ServiceSpec, decision: Decision, now_s: float) -> None:
        actions, release = decision.replicas, decision.release
        for state in self._states("replica"):
            state.draining_s = (state.draining_s or now_s) if state.id in actions.drain else None
            if state.id in actions.kill:
                if not state.exit_expected:
                    self._open_place(state)
                self._record_killing(state)
                self.target.stop(state.id, 0.0)
            elif state.id in actions.stop:
                state.exit_expected = True
                self.target.stop(state.id, REPLICA_GRACE_S)
        for id in decision.kill_gateways:
            self._record_killing(self._instances[id])
            self.target.stop(id, 0.0)
        for id in decision.stop_gateways:
            self._instances[id].exit_expected = True
            self.target.stop(id, GATEWAY_GRACE_S)
        if release is not None:
            for pool in actions.start:
                self._start_replica(spec, release, pool, now_s)
            if decision.start_gateway:
                self._start_gateway(spec, now_s)
        self._set_route(spec, release, actions.drain)

    def _set_route(self, spec: ServiceSpec, release: Release | None, draining: frozenset[str]) -> None:
        if release is None and self._shared is None:
            return  # the gateway stops
        replicas = [one for one in self._replicas() if not one.stopping]
        self.gateway.is_withdrawn = release is None and not replicas
        route = build_route(release or spec.release, replicas, draining)
        self.gateway.desired_route = None if self.gateway.is_withdrawn else route

    def _record_killing(self, state: InstanceState) -> None:
        if not state.is_killed:
            state.is_killed = True
            self.events.record("Killing", state.id, state.hang_reason)

    def _start_replica(self, spec: ServiceSpec, release: Release, pool: int, now_s: float) -> None:
        devices = self._free_devices(release, pool)
        if devices is None:
            self._note_failed_start(spec, "No free devices for one more replica.")
            return
        try:
            owner = f"{spec.name}-" if spec.gateway_service else ""  # unique among all replicas of a shared gateway
            id = f"{owner}r{self.store.next_number()}"
            instance = self.target.start(replica_spec(release, pool, id, devices))
        except PowerbandError as error:
            self._note_failed_start(spec, str(error))
            if spec.generation > self._last_ready_generation:
                self._failed = FailedRollout(generation=spec.generation, reason=str(error))
            return
        restarts = self._open_places.pop(0) if self._open_places else 0
        self._instances[id] = InstanceState(instance=instance, first_seen_s=now_s, restarts=restarts)

    def _start_gateway(self, spec: ServiceSpec, now_s: float) -> None:
        id = f"gateway-{self.store.next_number()}"
        try:
            instance = self.target.start(gateway_spec(spec.gateway, self.store, id))
        except PowerbandError as error:
            self._note_failed_start(spec, str(error))
            return
        self._instances[id] = InstanceState(instance=instance, first_seen_s=now_s)
        self.gateway.connect_to(instance.url)

    def _note_failed_start(self, spec: ServiceSpec, reason: str) -> None:
        """Every tick tries again; it is an event once."""
        self._notes.append(reason)
        if reason not in self._failed_starts:
            self._failed_starts.add(reason)
            self.events.record("FailedStart", spec.name, reason)

    # ---- report

    def _report(self, spec: ServiceSpec, decision: Decision, now_s: float) -> ServiceStatus:
        completed = self.gateway.take_completed()
        self.slo_counter.count(completed, spec.release.plan, spec.release.slo)
        crashes, self._crashes = self._crashes, []
        if decision.release is not None:
            self._remediator.run(
                decision.release,
                completed,
                crashes,
                self.gateway.snapshot,
                self._instances,
                allowed=spec.policy.auto_remediate and spec.generation <= self._last_ready_generation,
                has_room=self._has_room,
                now_s=now_s,
            )
        status = self._status(spec, decision.release, now_s)
        try:
            self.store.write_status(status)
        except OSError as error:  # the service runs without its status file
            logger.warning("Cannot write the status to %s: %s.", self.store.path, error)
        return status

    def _status(self, spec: ServiceSpec, release: Release | None, now_s: float) -> ServiceStatus:
        snapshot, offset_s = self.gateway.snapshot, time.time() - now_s
        replicas = tuple(
            replica_status(state, snapshot.replica(state.id) if snapshot is not None else None, offset_s)
            for state in self._states("replica")
        )
        gateway = self._gateway_status(spec, offset_s)
        is_established = spec.generation <= self._last_ready_generation
        return ServiceStatus(
            at=time.time(),
            pid=os.getpid(),
            generation=spec.generation,
            phase=service_phase(spec, release, replicas, gateway, established=is_established),
            revision=release_revision(release) if release is not None else "",
            gateway=gateway,
            replicas=replicas,
            last_ready_generation=self._last_ready_generation,
            failed_rollout=self._failed,
            load=self.slo_counter.load(
                requests_per_s=self.gateway.requests_per_s(),
                running=sum(one.running for one in replicas),
                queued=sum(pool.queued for pool in snapshot.pools) if snapshot is not None else 0,
                next_record=self.gateway.next_record,
            ),
            notes=(*self._notes, *self._backoff.messages()),
            incidents=self._remediator.open_incidents(),
            monitor=self._remediator.report(),
        )

    def _gateway_status(self, spec: ServiceSpec, offset_s: float) -> GatewayStatus:
        if self._shared is not None:
            return self._shared.status(is_removed=spec.removed)
        state = next(iter(self._states("gateway")), None)
        if state is None:
            url = f"http://{spec.gateway.host}:{spec.gateway.port}"
            return GatewayStatus(state="down", url=url, restarts=self._gateway_restarts)
        snapshot = self.gateway.snapshot
        # Ready: it listens, and it has routes.
        has_routes = snapshot is not None and snapshot.route_revision != "" and self.gateway.desired_route is not None
        is_ready = state.ready_s is not None and has_routes and not state.instance.stopping
        return GatewayStatus(
            state="ready" if is_ready else "starting",
            url=state.instance.url,
            pid=state.instance.pid,
            started_at=state.instance.started_at,
            ready_at=None if state.ready_s is None else state.ready_s + offset_s,
            restarts=self._gateway_restarts,
            note=state.probe.note or self.gateway.error,
        )
