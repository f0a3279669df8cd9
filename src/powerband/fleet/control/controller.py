"""Keeps a service as it is desired: one look at what is, one set of moves, several times a second.

    desired.json ───┐                         ┌──► target: start, stop
    target ─────────┼──► tick ──► next_moves ─┼──► gateway: routes
    probes, gateway ┘                         └──► status.json

A tick waits for nothing. What a controller remembers beyond the files is only for pace (pauses after deaths, time since
a drain began), so that a new one goes on where the last one was ended, whenever that was.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from powerband.errors import PowerbandError, UsageError
from powerband.fleet.control.crash_backoff import CrashBackoff
from powerband.fleet.control.gateway_client import GatewayClient
from powerband.fleet.control.instance_specs import (
    build_routes,
    excess_threads,
    free_devices,
    gateway_revision,
    gateway_spec,
    pool_revisions,
    release_revision,
    release_slo,
    replica_key,
    replica_spec,
)
from powerband.fleet.control.monitoring import MonitorDriver, expected_from, with_one_more
from powerband.fleet.control.probes import ProbeSource
from powerband.fleet.control.replica_state import ReplicaState
from powerband.fleet.control.rollout import DesiredReplicas, next_actions
from powerband.fleet.control.slo_counter import SLOCounter
from powerband.fleet.control.status import replica_status, service_phase
from powerband.fleet.monitor.incidents import Incidents
from powerband.fleet.monitor.monitor import Action, Monitor
from powerband.fleet.service.spec import Desired, Release
from powerband.fleet.service.status import FailedRollout, GatewayStatus, Status
from powerband.fleet.service.store import ServiceStore
from powerband.fleet.targets.base import ExitedInstance, Instance, Target
from powerband.gateway.request import Finished

logger = logging.getLogger(__name__)

REPLICA_GRACE_S = 15.0
GATEWAY_GRACE_S = 45.0


@dataclass(slots=True)
class Controller:
    """probes and front are tended by others in the same event loop; `clock` is time.monotonic() but in tests."""

    folder: ServiceStore
    target: Target
    probes: ProbeSource
    front: GatewayClient
    clock: Callable[[], float] = time.monotonic
    incidents: Incidents | None = None  # None: not kept
    traffic: SLOCounter = field(default_factory=SLOCounter)
    webhook: str = ""  # as desired at the last look
    _known: dict[str, ReplicaState] = field(default_factory=dict)
    _deaths: CrashBackoff = field(default_factory=CrashBackoff)
    _generation: int = 0  # that was looked at last
    _established: int = 0
    _rejected: FailedRollout | None = None
    _vacant: list[int] = field(default_factory=list)  # restarts of the places that are to be filled anew
    _gateway_restarts: int = 0
    _notes: list[str] = field(default_factory=list)
    _watching: MonitorDriver | None = None

    def adopt(self) -> None:
        """Take over what another controller left: what was ready is taken to be."""
        status = self.folder.status()
        if status is None:
            return
        self._established, self._rejected = status.established, status.rejected
        self._gateway_restarts = status.gateway.restarts
        self.traffic.resume(status.load)
        self.front.url, self.front.next_record = status.gateway.url, status.load.next_record
        now_s = self.clock()
        before = {replica.id: replica for replica in status.replicas}
        for running in self.target.running():
            known = self._known[running.id] = ReplicaState(running, now_s, leaving=running.stopping)
            if running.id in before:
                known.restarts = before[running.id].restarts
                known.ready_s = now_s if before[running.id].ready_at is not None else None
            elif running.role == "gateway" and running.pid == status.gateway.pid:
                known.ready_s = now_s if status.gateway.ready_at is not None else None

    def tick(self) -> bool:
        """One look and its moves. False: the service was removed, and nothing of it runs any more."""
        desired = self.folder.desired()
        if desired is None:
            return False
        self._notes = []
        if desired.generation != self._generation:
            self._generation = desired.generation
            self._deaths.try_anew()
        now_s = self.clock()
        self.webhook = desired.policy.webhook
        self.probes.key = replica_key(desired.release.api_key_file)
        self._look(now_s)
        self._judge(desired)
        release = None if desired.removed else desired.previous if self._is_rejected(desired) else desired.release
        draining = self._move(desired, release, now_s)
        self._tend_gateway(desired, release, now_s)
        if release is not None:
            kept = [one for one in self._of("replica") if not one.stopping]
            self.front.wanted = build_routes(release, kept, draining)
        finished = self.front.take()
        self.traffic.count(finished, release_slo(desired.release))
        if release is not None:
            self._watch(desired, release, finished, now_s)
        status = self._status(desired, release, now_s)
        try:
            self.folder.write_status(status)
        except OSError as problem:  # it is there for people: the service goes on without it
            logger.warning("%s cannot write what it sees: %s.", self.folder.path, problem)
        return status.phase != "removed"

    # ---- what is

    def _look(self, now_s: float) -> None:
        """Who lives, who died, who became ready."""
        members = self.target.running()
        for gone in self.target.gone():
            self._note_death(gone, now_s)
        self.probes.follow({one.id: one for one in members})
        for running in members:
            known = self._known.setdefault(running.id, ReplicaState(running, now_s))
            known.running = running
            if known.look(self.probes.sight(running.id), now_s):
                self._deaths.became_ready(running.revision)

    def _note_death(self, gone: ExitedInstance, now_s: float) -> None:
        known = self._known.pop(gone.id, None)
        if known is None or known.leaving:
            return
        ready_for_s = None if known.ready_s is None else now_s - known.ready_s
        self._deaths.note(known.running.revision, gone, now_s, ready_for_s=ready_for_s)
        if known.running.role == "gateway":
            self._gateway_restarts += 1
        else:
            self._vacate(known)

    def _vacate(self, known: ReplicaState) -> None:
        """Whoever is started next takes its place."""
        if not known.vacated:
            known.vacated = True
            self._vacant.append(known.restarts + 1)

    def _judge(self, desired: Desired) -> None:
        """Whether this generation is all there; give it up if it never was and does not start."""
        if desired.removed or desired.generation <= self._established or self._is_rejected(desired):
            return
        revisions = pool_revisions(desired.release)
        ready = [known.running for known in self._known.values() if known.ready_s is not None]
        found = [(one.pool, one.revision) for one in ready if one.role == "replica"]
        is_whole = all(
            found.count((pool, revision)) >= count
            for pool, (count, revision) in enumerate(zip(desired.release.counts, revisions, strict=True))
        )
        front = gateway_revision(desired.front)
        if is_whole and any(one.revision == front for one in ready if one.role == "gateway"):
            self._established = desired.generation
            return
        for revision in (*revisions, front):
            gone = self._deaths.last(revision)
            if gone is not None and self._deaths.is_lost(revision):
                code = "" if gone.exit_code is None else f" (exit code {gone.exit_code})"
                self._reject(desired, f"{gone.id} ended before it was ready{code}", gone)
                return

    def _reject(self, desired: Desired, why: str, gone: ExitedInstance | None = None) -> None:
        self._rejected = FailedRollout(generation=desired.generation, why=why)
        if gone is not None:
            self._rejected = FailedRollout(
                generation=desired.generation, why=why, replica=gone.id, log=gone.log, exit_code=gone.exit_code
            )

    def _is_rejected(self, desired: Desired) -> bool:
        return self._rejected is not None and self._rejected.generation == desired.generation

    def _of(self, role: str) -> list[Instance]:
        return [known.running for known in self._known.values() if known.running.role == role]

    # ---- replicas

    def _move(self, desired: Desired, release: Release | None, now_s: float) -> frozenset[str]:
        """Returns the replicas that get nothing new."""
        replicas = [known for known in self._known.values() if known.running.role == "replica"]
        members = [
            known.member(
                self.probes.sight(known.running.id),
                desired.policy,
                now_s,
                set_aside=known.running.id in desired.drained,
                empty=self._is_empty(known.running.id, release),
            )
            for known in replicas
        ]
        moves = next_actions(self._want(desired, release, now_s), members)
        for known in replicas:
            id = known.running.id
            known.draining_s = (known.draining_s or now_s) if id in moves.drain else None
            if id in moves.kill:
                if not known.leaving:
                    self._vacate(known)
                self.target.stop(id, 0.0)
            elif id in moves.stop:
                known.leaving = True
                self.target.stop(id, REPLICA_GRACE_S)
        if release is not None:
            for pool in moves.start:
                self._start(desired, release, pool, now_s)
        return moves.drain

    def _is_empty(self, id: str, release: Release | None) -> bool:
        """Whether the gateway knows that the replica is to get nothing new, and has nothing there any more."""
        if release is None:
            return not self._of("gateway")
        heard = self.front.heard
        if heard is None or id not in heard.draining:
            return False
        snapshot = heard.replica(id)
        return snapshot is None or snapshot.inflight == 0

    def _want(self, desired: Desired, release: Release | None, now_s: float) -> DesiredReplicas:
        if release is None:
            return DesiredReplicas(counts=(), revisions=())
        revisions, surge = pool_revisions(release), desired.policy.surge
        if surge is None:
            existing = Counter((one.pool, one.revision) for one in self._of("replica"))
            wanted = Counter({(i, revisions[i]): count for i, count in enumerate(release.counts)})
            # Who exceeds the number already has the room; where all is well nobody needs it.
            is_free = existing == wanted or existing.total() > wanted.total()
            surge = 1 if is_free or self._has_room(release) else 0
        return DesiredReplicas(counts=release.counts, revisions=revisions, surge=surge, held=self._deaths.held(now_s))

    def _has_room(self, release: Release) -> bool:
        has_devices = all(self._devices(release, pool) is not None for pool in range(len(release.counts)))
        return has_devices and self.target.room_for_one_more()

    def _devices(self, release: Release, pool: int) -> tuple[int, ...] | None:
        others = self.target.taken_devices() if release.gpus else frozenset[int]()
        return free_devices(release, pool, self._of("replica"), others)

    def _start(self, desired: Desired, release: Release, pool: int, now_s: float) -> None:
        devices = self._devices(release, pool)
        if devices is None:
            self._notes.append("There are no free devices for one more replica.")
            return
        try:
            id = f"r{self.folder.next_number()}"
            running = self.target.start(replica_spec(release, pool, id, devices))
        except PowerbandError as problem:
            self._notes.append(str(problem))
            if desired.generation > self._established:
                self._reject(desired, str(problem))
            return
        self._known[id] = ReplicaState(running, now_s, restarts=self._vacant.pop(0) if self._vacant else 0)

    # ---- the gateway

    def _tend_gateway(self, desired: Desired, release: Release | None, now_s: float) -> None:
        """One, on its port; it goes before the replicas when all has to go."""
        revision = gateway_revision(desired.front)
        gateways = self._of("gateway")
        for one in gateways:
            known = self._known[one.id]
            if known.is_hung(self.probes.sight(one.id), desired.policy, now_s):
                self.target.stop(one.id, 0.0)
            elif release is None or one.revision != revision:
                known.leaving = True
                self.target.stop(one.id, GATEWAY_GRACE_S)
        if gateways or release is None or revision in self._deaths.held(now_s):
            return
        id = f"gateway-{self.folder.next_number()}"
        try:
            running = self.target.start(gateway_spec(desired.front, self.folder, id))
        except PowerbandError as problem:
            self._notes.append(str(problem))
            return
        self._known[id] = ReplicaState(running, now_s)
        self.front.turn_to(running.url)

    def _gateway_status(self, desired: Desired, now_s: float) -> GatewayStatus:
        gateways = self._of("gateway")
        if not gateways:
            url = f"http://{desired.front.host}:{desired.front.port}"
            return GatewayStatus(state="down", url=url, restarts=self._gateway_restarts)
        one = gateways[0]
        known = self._known[one.id]
        # Ready to be used: it listens, and it knows where to send requests.
        heard, wanted = self.front.heard, self.front.wanted
        knows = heard is not None and wanted is not None and heard.revision != ""
        return GatewayStatus(
            state="ready" if known.ready_s is not None and knows and not one.stopping else "starting",
            url=one.url,
            pid=one.pid,
            started_at=one.started_at,
            ready_at=None if known.ready_s is None else known.ready_s + time.time() - now_s,
            restarts=self._gateway_restarts,
            note=known.note or self.front.problem,
        )

    # ---- the watcher

    def _watch(self, desired: Desired, release: Release, finished: Sequence[Finished], now_s: float) -> None:
        if self._watching is None:
            self._watching = MonitorDriver(Monitor(expected_from(release), self.incidents), self._carry_out)
        metrics = {id: text for id in self._known if (text := self.probes.sight(id).metrics)}
        auto = desired.policy.auto and desired.generation <= self._established
        self._watching.look(release, finished, self.front.heard, metrics, auto=auto, now_s=now_s)

    def _carry_out(self, action: Action) -> str:
        """Raises UsageError where there is no room."""
        if action.kind == "add_replica":
            return self._add_replica()
        known = self._known.get(action.replica)
        if known is None:
            raise UsageError(f"{action.replica} is gone.")
        known.condemned = True
        return f"{action.replica} is drained, another takes its place"

    def _add_replica(self) -> str:
        with self.folder.changing(wait_s=0.0):  # a look waits for nobody; the next one tries again
            desired = self.folder.desired()
            if desired is None or desired.removed or not self._has_room(desired.release):
                raise UsageError("There is no room for one more replica here.")
            if excess_threads(with_one_more(desired.release, {})):
                raise UsageError("All cores of this machine compute already.")
            loads: Counter[int] = Counter()
            for running in self._of("replica"):
                heard = self.front.heard.replica(running.id) if self.front.heard is not None else None
                loads[running.pool] += heard.inflight if heard is not None else 0
            release = with_one_more(desired.release, loads)
            self.folder.write_desired(
                replace(desired, generation=desired.generation + 1, release=release, previous=desired.release)
            )
        return f"one more replica: {' + '.join(map(str, release.counts))}"

    # ---- what is told

    def _status(self, desired: Desired, release: Release | None, now_s: float) -> Status:
        heard = self.front.heard
        replicas = tuple(
            replica_status(
                known,
                self.probes.sight(known.running.id),
                heard.replica(known.running.id) if heard is not None else None,
                set_aside=known.running.id in desired.drained,
                now_s=now_s,
                clock_offset_s=time.time() - now_s,
            )
            for known in self._known.values()
            if known.running.role == "replica"
        )
        gateway = self._gateway_status(desired, now_s)
        established = desired.generation <= self._established
        load = self.traffic.load(
            requests_per_s=self.front.requests_per_s(),
            running=sum(one.running for one in replicas),
            queued=sum(pool.queued for pool in heard.pools) if heard is not None else 0,
            next_record=self.front.next_record,
        )
        return Status(
            at=time.time(),
            pid=os.getpid(),
            generation=desired.generation,
            phase=service_phase(desired, release, replicas, gateway, established=established),
            revision=release_revision(release) if release is not None else "",
            gateway=gateway,
            replicas=replicas,
            established=self._established,
            rejected=self._rejected,
            load=load,
            notes=(*self._notes, *self._deaths.told()),
            incidents=self._watching.told() if self._watching is not None else (),
            watcher=self._watching.report() if self._watching is not None else {},
        )
