"""A world without processes: members live in memory, and outlive controllers; it checks what controllers do to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from powerband.fleet.control.controller import Controller
from powerband.fleet.control.gateway_client import GatewayClient, GatewaySnapshot
from powerband.fleet.control.instance_specs import pool_revisions
from powerband.fleet.control.probes import ProbeResult
from powerband.fleet.service.spec import Desired, GatewaySpec, Policy, PoolRelease, Release
from powerband.fleet.service.status import Status
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
    """Of one member. silent: it takes connections, and neither answers nor hears what it is asked. mute: it does not
    listen. killed: at once.
    """

    running: Instance
    ready: bool = False
    silent: bool = False
    mute: bool = False
    killed: bool = False
    inflight: int = 0


@dataclass
class World:
    """The target, the probes, and the gateway's answers, all in one. time goes on only when it is told to."""

    folder: ServiceStore
    now_s: float = 1000.0
    lives: dict[str, Life] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)  # commands that never start
    most: int = 0  # that may exist when one is started; 0: not checked
    kill_in: int | None = None  # calls of the target until the controller is killed
    started: int = 0
    used: set[str] = field(default_factory=set)
    cut_off: int = 0  # requests
    key: str = ""
    _gone: list[ExitedInstance] = field(default_factory=list)
    _commands: dict[str, str] = field(default_factory=dict)

    # ---- the target

    def start(self, launch: InstanceSpec) -> Instance:
        assert launch.id not in self.used, "an id is never used again"
        self.used.add(launch.id)
        if launch.role == "replica":
            self.started += 1
            assert not self.most or len(self.replicas()) < self.most
        running = Instance(
            id=launch.id,
            role=launch.role,
            revision=launch.revision,
            pool=launch.pool,
            url="http://127.0.0.1:1",
            pid=1,
            started_at=self.now_s,
        )
        self.lives[launch.id] = Life(running)
        self._commands[launch.id] = launch.command[0]
        self._maybe_kill()
        return running

    def running(self) -> Sequence[Instance]:
        return [life.running for life in self.lives.values()]

    def gone(self) -> Sequence[ExitedInstance]:
        found, self._gone = self._gone, []
        return found

    def stop(self, id: str, grace_s: float) -> None:
        life = self.lives.get(id)
        if life is None:
            return
        self._maybe_kill()
        if not life.running.stopping and grace_s > 0:
            self.cut_off += life.inflight
        life.running = replace(life.running, stopping=True)
        life.killed = life.killed or grace_s <= 0

    def log(self, id: str) -> Path | None:
        return None

    def taken_devices(self) -> frozenset[int]:
        return frozenset()

    def room_for_one_more(self) -> bool:
        return True

    def _maybe_kill(self) -> None:
        if self.kill_in is not None:
            self.kill_in -= 1
            if self.kill_in < 0:
                self.kill_in = None
                raise ControllerKilled

    # ---- the probes

    def follow(self, members: Mapping[str, Instance]) -> None:
        return

    def sight(self, id: str) -> ProbeResult:
        life = self.lives.get(id)
        if life is None:
            return ProbeResult()
        if life.mute:
            return ProbeResult(silences=9)
        if life.silent:
            return ProbeResult(ready_s=1.0 if life.ready else None, heard_s=1.0, silences=9, unanswered=9)
        return ProbeResult(ready_s=self.now_s if life.ready else None, heard_s=self.now_s)

    # ---- what happens

    def replicas(self) -> list[Life]:
        return [life for life in self.lives.values() if life.running.role == "replica"]

    def serving(self) -> int:
        return sum(life.ready and not life.silent and not life.running.stopping for life in self.replicas())

    def pass_time(self, seconds: float) -> None:
        """Who starts is ready or dead, who stops is gone."""
        self.now_s += seconds
        for id, life in list(self.lives.items()):
            if life.killed or (life.running.stopping and not life.silent):
                self.die(id, exit_code=0)
            elif not life.ready and not life.silent and not life.mute:
                if self._commands[id] in self.broken:
                    self.die(id, exit_code=1)
                else:
                    life.ready = True

    def die(self, id: str, exit_code: int = -9) -> None:
        del self.lives[id]
        self._gone.append(ExitedInstance(id, exit_code, "the end of its log"))

    def found(self) -> Counter[tuple[int, str]]:
        return Counter((life.running.pool, life.running.revision) for life in self.replicas() if life.ready)


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
        self.world.gone()  # nobody was there to be told
        self.controller = Controller(
            self.world.folder, self.world, self.world, GatewayClient("key"), clock=lambda: self.world.now_s
        )
        self.controller.adopt()

    def tick(self) -> None:
        """One look; the gateway answers at once. Where the controller is killed, a new one follows."""
        try:
            self.controller.tick()
        except ControllerKilled:
            self.new_controller()
        front = self.controller.front
        gateway = next((life for life in self.world.lives.values() if life.running.role == "gateway"), None)
        front.heard = None
        if gateway is not None and gateway.ready and front.wanted is not None:
            draining = frozenset(r.id for m in front.wanted.models for r in m.replicas if r.draining)
            snapshots = tuple(
                ReplicaSnapshot(id=life.running.id, state="ready", inflight=life.inflight)
                for life in self.world.replicas()
            )
            pools = (PoolSnapshot(model="m", replicas=snapshots),)
            front.heard = GatewaySnapshot(front.wanted.revision, draining, pools, self.world.now_s)

    def settle(self, rounds: int = 40) -> Status:
        for _ in range(rounds):
            self.tick()
            self.world.pass_time(0.5)
        self.tick()
        return self.status()

    def status(self) -> Status:
        status = self.world.folder.status()
        assert status is not None
        return status

    def desire(self, made: Release, **fields: object) -> Desired:
        """As the commands do: the generation counts, what was whole is what to go back to."""
        folder = self.world.folder
        current = folder.desired()
        status = folder.status()
        previous = None
        if current is not None:
            is_whole = status is not None and status.established >= current.generation
            previous = current.release if is_whole else current.previous
        desired = Desired(
            name=folder.name,
            generation=1 if current is None else current.generation + 1,
            release=made,
            front=GatewaySpec(host="127.0.0.1", port=8000),
            policy=Policy(surge=1, drain_s=60.0, ready_s=20.0),
            previous=previous,
        )
        desired = replace(desired, **fields)  # type: ignore[arg-type] # of Desired
        folder.write_desired(desired)
        return desired

    def is_as_desired(self) -> bool:
        desired = self.world.folder.desired()
        assert desired is not None
        pools = enumerate(zip(desired.release.counts, pool_revisions(desired.release), strict=True))
        return self.world.found() == Counter({(pool, revision): count for pool, (count, revision) in pools})


def play_in(path: Path) -> Play:
    folder = ServiceStore(path)
    folder.make()
    return Play(World(folder))
