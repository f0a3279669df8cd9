"""What a service should be: the release it runs, its gateway, and the policy for changes. Stored in desired.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from powerband.spec.deployment import EngineName


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRelease:
    """Equal replicas, and how one is started: by the adapter of its engine, when the release was made.

    command: with the word {port}. threads: that one computes with on a CPU; None: the engine's choice. gpus: that one
    takes. max_num_seqs, longest_prompt: as the plan has them.
    """

    count: int
    engine: EngineName
    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    ready_path: str = "/readyz"
    max_num_seqs: int = 256
    longest_prompt: int | None = None
    threads: int | None = None
    gpus: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What a service runs. plan: Plan.as_dict(). gpus: indices of those that the replicas may use; none on a CPU.
    api_key_file: of the key that they want; '': none.
    """

    plan: dict[str, Any]
    served_name: str
    pools: tuple[PoolRelease, ...]
    gpus: tuple[int, ...] = ()
    api_key_file: str = ""

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(pool.count for pool in self.pools)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySpec:
    """How the gateway listens. arguments: more of its settings, as its command takes them."""

    host: str
    port: int
    auth: Literal["open", "keys"] = "open"
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """surge: replicas beyond the asked number while one is replaced; 0: the old one ends first; None: 1 where memory
    and devices allow. Seconds: drain_s, for running requests to end; ready_s, for a replica to become ready; hung_s,
    without an answer until a replica counts as hung; unready_s, that it may say that it is not ready.
    auto: carry out what the watcher suggests. webhook: a URL that is told of incidents.
    """

    surge: int | None = None
    drain_s: float = 120.0
    ready_s: float = 1800.0
    hung_s: float = 6.0
    unready_s: float = 30.0
    auto: bool = False
    webhook: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """What a service should be. generation: counts the changes. previous: what ran before this release, to go back to.

    drained: replicas that get nothing new until they are brought back.
    """

    name: str
    generation: int
    release: Release
    front: GatewaySpec
    policy: Policy = field(default_factory=Policy)
    previous: Release | None = None
    drained: tuple[str, ...] = ()
    removed: bool = False
