"""What a fleet asks of the place where its members run: this machine's processes today, a cluster's pods as well.

A member is a replica or the gateway. A target keeps no wishes: it starts, finds anew, and stops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

Role = Literal["replica", "gateway"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSpec:
    """One member to start. id: unique, never used again. revision: names what it runs. `{port}` in the command becomes
    the port that the target chose, where `port` does not say one. ready_path: answers 200 when it is ready. devices:
    accelerators that it has to itself.
    """

    id: str
    role: Role
    revision: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    pool: int = 0
    host: str = "127.0.0.1"
    port: int | None = None
    ready_path: str = "/readyz"
    devices: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A member that was started and has not been found to be gone. stopping: it was asked to end.

    pid: 0 where the target has none. started_at: time.time().
    """

    id: str
    role: Role
    revision: str
    pool: int
    url: str
    pid: int
    started_at: float
    stopping: bool = False
    ready_path: str = "/readyz"
    devices: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ExitedInstance:
    """A member that ended. exit_code: None where nobody was told. log: the end of what it said."""

    id: str
    exit_code: int | None
    log: str


class Target(Protocol):
    """Every method returns at once; nothing here waits for a member."""

    def start(self, launch: InstanceSpec) -> Instance:
        """Raises EnvironmentFault when it cannot be started at all. Once it returns, `running` knows the member, also
        after a crash of whoever called.
        """
        ...

    def running(self) -> Sequence[Instance]:
        """All members of this service, whoever started them, found anew."""
        ...

    def gone(self) -> Sequence[ExitedInstance]:
        """Members that ended since the last call, asked or not."""
        ...

    def stop(self, id: str, grace_s: float) -> None:
        """Ask it to end, and insist after `grace_s`; asking again changes nothing, but for a shorter grace."""
        ...

    def log(self, id: str) -> Path | None:
        """What it says, where that is a file."""
        ...

    def taken_devices(self) -> frozenset[int]:
        """Accelerators that members of other services have."""
        ...

    def room_for_one_more(self) -> bool:
        """Whether a replica like those that run would fit beside them, as far as can be known."""
        ...
