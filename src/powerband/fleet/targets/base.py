"""The interface of a target, which runs the controller's instances: today as processes of this machine, later as pods.

An instance is a replica or the gateway. A target keeps no desired state: it starts, lists and stops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

Role = Literal["replica", "gateway"]


def shown_name(id: str) -> str:
    """What people read: every start of the gateway has an id and a log of its own, such as gateway-3."""
    return "gateway" if id.startswith("gateway-") else id


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSpec:
    """An instance to start."""

    id: str  # unique, never reused
    role: Role
    revision: str  # identifies what it runs
    command: tuple[str, ...]  # {port} in it becomes the port
    env: Mapping[str, str] = field(default_factory=dict)
    pool: int = 0
    host: str = "127.0.0.1"
    port: int | None = None  # None: the target chooses a free one
    ready_path: str = "/readyz"  # responds with 200 when the instance is ready
    metrics_path: str = "/metrics"
    devices: tuple[int, ...] = ()  # accelerators that no other instance uses


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """An instance that was started and has not exited, as far as the target knows."""

    id: str
    role: Role
    revision: str
    pool: int
    url: str
    pid: int  # 0: the target has no process ids
    started_at: float  # time.time()
    stopping: bool = False  # it was asked to stop
    ready_path: str = "/readyz"
    metrics_path: str = "/metrics"
    devices: tuple[int, ...] = ()


_MAX_ERROR_LINE = 300  # characters


@dataclass(frozen=True, slots=True)
class ExitedInstance:
    id: str
    exit_code: int | None  # negative: of the signal that ended it; None: not known
    log: str  # the last lines of its log
    exit_expected: bool = False  # it was asked to stop
    oom_killed: bool = False  # the kernel killed it, or another process at the same time, because memory ran out
    after_reboot: bool = False  # it ended with the machine

    @property
    def error_line(self) -> str:
        """Its last error, else the last line of its log: Powerband's own errors end with a hint."""
        lines = [line for line in self.log.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or [""])[-1].strip()[:_MAX_ERROR_LINE]


class Target(Protocol):
    """Starts, lists and stops instances. No method blocks on an instance."""

    def start(self, spec: InstanceSpec) -> Instance:
        """Raises EnvironmentFault when the instance cannot be started. Once this returns, `list_instances` includes the
        instance, even if the caller crashes right after.
        """
        ...

    def list_instances(self) -> Sequence[Instance]:
        """All instances of this service, including those that another controller started."""
        ...

    def take_exited(self) -> Sequence[ExitedInstance]:
        """Instances that exited since the last call, whether they were asked to or not."""
        ...

    def stop(self, id: str, grace_s: float) -> None:
        """Ask an instance to stop, and kill it after `grace_s`. A second call can only shorten the grace period."""
        ...

    def log(self, id: str) -> Path | None:
        """The instance's log, if it is a file."""
        ...

    def devices_in_use(self) -> frozenset[int]:
        """Accelerators that instances of other services use."""
        ...

    def has_room_for_replica(self) -> bool:
        """Whether one more replica like the running ones would fit into memory, as far as the target knows."""
        ...
