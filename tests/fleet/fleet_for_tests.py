"""A world without processes: instances live in memory, and outlive controllers; it checks what controllers do to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from powerband.fleet.control.controller import Controller
from powerband.fleet.control.gateway_client import GatewayClient, GatewaySnapshot
from powerband.fleet.control.instance_specs import pool_revisions
from powerband.fleet.control.probes import ProbeResult
from powerband.fleet.service.spec import GatewaySpec, Policy, PoolRelease, Release, ServiceSpec
from powerband.fleet.service.status import ServiceStatus
from powerband.fleet.service.store import ServiceStore
from powerband.fleet.targets.base import ExitedInstance, Instance, InstanceSpec
from powerband.gateway.snapshot import PoolSnapshot, ReplicaSnapshot

PLAN = {
    "version": 1,
    "model": "m",
    "workload": {},
    "slo": {"ttft_s": 1.0, "attainment": 0.95},
    "promise": {"rate": 1.0},
}


class ControllerKilled(BaseException):
    """In the middle of a tick."""


def release(*counts: int, command: str = "a", **fields: object) -> Release:
    pools = tuple(
        PoolRelease(count=count, engine="powerband", command=(command, str(pool)), **fields)  # type: ignore[arg-type] # of PoolRelease
        for pool, count in enumerate(counts)
    )
    return Release(plan=PLAN, served_name="m", pools=pools)


@dataclass
class Life:
    """Of one instance."""

    instance: Instance
    ready: bool = False
    silent: bool = False  # it accepts connections, but does not respond, and ignores signals to stop
    mute: bool = False  # it does not listen
    killed: bool = False
    inflight: int = 0
    engine_restarts: int = 0


@dataclass
class World:
    """The target, the probes, and the gateway's responses, all in one. Time passes only in `pass_time`."""

    store: ServiceStore
    now_s: float = 1000.0
    lives: dict[str, Life] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)  # commands that never start
    max_replicas: int = 0  # including the one that is started; 0: not checked
    kill_in: int | None = None  # calls of the target until the controller is killed
    started: int = 0
    used: set[str] = field(default_factory=set)
    cut_off: int = 0  # requests
    api_key: str = ""
    _exited: list[ExitedInstance] = field(default_factory=list)
    commands: dict[str, str] = field(default_factory=dict)

    # ---- the target

    def start(self, spec: InstanceSpec) -> Instance:
        assert spec.id not in self.used, "an id is never used again"
        self.used.add(spec.id)
        if spec.role == "replica":
            self.started += 1
            assert not self.max_replicas or len(self.replicas()) < self.max_replicas
        instance = Instance(
            id=spec.id,
            role=spec.role,
            revision=spec.revision,
            pool=spec.pool,
            url="http://127.0.0.1:1",
            pid=1,
            started_at=self.now_s,
        )
        self.lives[spec.id] = Life(instance)
        self.commands[spec.id] = spec.command[0]
        self._maybe_kill()
        return instance

    def list_instances(self) -> Sequence[Instance]:
        return [life.instance for life in self.lives.values()]

    def take_exited(self) -> Sequence[ExitedInstance]:
        found, self._exited = self._exited, []
        return found

    def stop(self, id: str, grace_s: float) -> None:
        life = self.lives.get(id)
        if life is None:
            return
        self._maybe_kill()
        if not life.instance.stopping and grace_s > 0:
            self.cut_off += life.inflight
        life.instance = replace(life.instance, stopping=True)
        life.killed = life.killed or grace_s <= 0

    def log(self, id: str) -> Path | None:
        return None

    def devices_in_use(self) -> frozenset[int]:
        return frozenset()

    def has_room_for_replica(self) -> bool:
        return True

    def _maybe_kill(self) -> None:
        if self.kill_in is not None:
            self.kill_in -= 1
            if self.kill_in < 0:
                self.kill_in = None
                raise ControllerKilled

    # ---- the probes

    def set_targets(self, instances: Mapping[str, Instance]) -> None:
        return

    def result(self, id: str) -> ProbeResult:
        life = self.lives.get(id)
        if life is None:
            return ProbeResult()
        if life.mute:
            return ProbeResult(failures=9)
        if life.silent:
            return ProbeResult(ready_s=1.0 if life.ready else None, response_s=1.0, failures=9, timeouts=9)
        exit = (
            ("The engine's process was killed by SIGKILL while serving.", 137) if life.engine_restarts else ("", None)
        )
        return ProbeResult(
            ready_s=self.now_s if life.ready else None,
            response_s=self.now_s,
            engine_restarts=life.engine_restarts,
            engine_exit=exit[0],
            engine_exit_code=exit[1],
        )

    # ---- what happens

    def replicas(self) -> list[Life]:
        return [life for life in self.lives.values() if life.instance.role == "replica"]

    def serving(self) -> int:
        return sum(life.ready and not life.silent and not life.instance.stopping for life in self.replicas())

    def pass_time(self, seconds: float) -> None:
        """Who starts is ready or dead, who stops is gone."""
        self.now_s += seconds
        for id, life in list(self.lives.items()):
            if life.killed or (life.instance.stopping and not life.silent):
                self.die(id, exit_code=0)
            elif not life.ready and not life.silent and not life.mute:
                if self.commands[id] in self.broken:
                    self.die(id, exit_code=1)
                else:
                    life.ready = True

    def die(self, id: str, exit_code: int = -9) -> None:
        life = self.lives.pop(id)
        log = "the end of its log"
        self._exited.append(ExitedInstance(id, exit_code, log, exit_expected=life.instance.stopping or life.killed))

    def found(self) -> Counter[tuple[int, str]]:
        return Counter((life.instance.pool, life.instance.revision) for life in self.replicas() if life.ready)


@dataclass
class Play:
    """Controllers in a world, one after the other."""

    world: World
    controller: Controller = field(init=False)
    controllers: int = 0

    def __post_init__(self) -> None:
        self.new_controller()

    def new_controller(self) -> None:
        self.controllers += 1
        self.controller = Controller(
            self.world.store, self.world, self.world, GatewayClient("key"), clock=lambda: self.world.now_s
        )
        self.controller.recover()

    def tick(self) -> None:
        """The gateway responds at once. Where the controller is killed, a new one follows."""
        try:
            self.controller.tick()
        except ControllerKilled:
            self.new_controller()
        client = self.controller.gateway
        gateway = next((life for life in self.world.lives.values() if life.instance.role == "gateway"), None)
        client.snapshot = None
        if gateway is not None and gateway.ready and client.desired_route is not None:
            draining = frozenset(one.id for one in client.desired_route.replicas if one.draining)
            snapshots = tuple(
                ReplicaSnapshot(id=life.instance.id, state="ready", inflight=life.inflight)
                for life in self.world.replicas()
            )
            pools = (PoolSnapshot(model="m", replicas=snapshots),)
            client.snapshot = GatewaySnapshot(client.desired_route.revision, draining, pools, self.world.now_s)

    def settle(self, rounds: int = 40) -> ServiceStatus:
        for _ in range(rounds):
            self.tick()
            self.world.pass_time(0.5)
        self.tick()
        return self.status()

    def status(self) -> ServiceStatus:
        status = self.world.store.read_status()
        assert status is not None
        return status

    def desire(self, made: Release, **fields: object) -> ServiceSpec:
        """As the commands do: the generation counts, what was whole is what to go back to."""
        store = self.world.store
        current = store.read_spec()
        status = store.read_status()
        previous = None
        if current is not None:
            is_whole = status is not None and status.last_ready_generation >= current.generation
            previous = current.release if is_whole else current.previous
        desired = ServiceSpec(
            name=store.name,
            generation=1 if current is None else current.generation + 1,
            release=made,
            gateway=GatewaySpec(host="127.0.0.1", port=8000),
            policy=Policy(max_surge=1, drain_timeout_s=60.0, start_timeout_s=20.0),
            previous=previous,
        )
        desired = msgspec.structs.replace(desired, **fields)
        store.write_spec(desired)
        return desired

    def is_as_desired(self) -> bool:
        desired = self.world.store.read_spec()
        assert desired is not None
        pools = enumerate(zip(desired.release.counts, pool_revisions(desired.release), strict=True))
        return self.world.found() == Counter({(pool, revision): count for pool, (count, revision) in pools})


def play_in(path: Path) -> Play:
    store = ServiceStore(path)
    store.create()
    return Play(World(store))
