"""The desired state of a service: its release, its gateway, and its policy for changes (desired.json).

`name=` keeps the field names of the file, so that a controller and a command of different versions understand it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from powerband.spec.deployment import EngineName
from powerband.spec.slo import SLO


class PoolRelease(msgspec.Struct, frozen=True, kw_only=True):
    """Equal replicas, and the command that starts one: written by the engine's adapter when the release was built."""

    count: int
    engine: EngineName
    command: tuple[str, ...]  # with {port} where the port goes
    env: dict[str, str] = {}
    ready_path: str = "/readyz"
    max_num_seqs: int = 256
    max_prompt_tokens: int | None = msgspec.field(default=None, name="longest_prompt")
    threads: int | None = None  # of one replica on a CPU; None: the engine's choice
    gpus: int = 0  # of one replica


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """A version of the service: what its replicas run."""

    plan: dict[str, Any]  # Plan.as_dict()
    served_name: str
    pools: tuple[PoolRelease, ...]
    gpus: tuple[int, ...] = ()  # indices that the replicas may use; none on a CPU
    api_key_file: str = ""  # contains the replicas' API key; '': they need none

    @property
    def counts(self) -> tuple[int, ...]:
        """Replicas of each pool."""
        return tuple(pool.count for pool in self.pools)

    @property
    def slo(self) -> SLO:
        return SLO.from_dict(self.plan["slo"])

    def with_counts(self, counts: Sequence[int]) -> Release:
        """The same release with other numbers of replicas. counts: by pool."""
        pools = [msgspec.structs.replace(pool, count=count) for pool, count in zip(self.pools, counts, strict=True)]
        return msgspec.structs.replace(self, pools=tuple(pools))


class GatewaySpec(msgspec.Struct, frozen=True, kw_only=True):
    """Where the gateway listens, and its settings."""

    host: str
    port: int
    auth: Literal["open", "keys"] = "open"
    arguments: tuple[str, ...] = ()  # more options of `powerband gateway`


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """How changes are rolled out and failures handled. Times in seconds."""

    # Extra replicas during a rollout; 0: an old one stops first; None: 1 if memory and devices allow.
    max_surge: int | None = msgspec.field(default=None, name="surge")
    drain_timeout_s: float = msgspec.field(default=120.0, name="drain_s")  # for running requests to finish
    start_timeout_s: float = msgspec.field(default=1800.0, name="ready_s")  # for a replica to become ready
    hang_timeout_s: float = msgspec.field(default=6.0, name="hung_s")  # without a response
    unready_timeout_s: float = msgspec.field(default=30.0, name="unready_s")  # responding, but not ready
    auto_remediate: bool = msgspec.field(default=False, name="auto")  # carry out the actions that the monitor suggests
    webhook: str = ""  # URL that incidents are sent to


class ServiceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The desired state of a service."""

    name: str
    generation: int  # grows by 1 with each change
    release: Release
    gateway: GatewaySpec = msgspec.field(name="front")
    policy: Policy = Policy()
    previous: Release | None = None  # the last release that was ready, for a rollback
    drained: tuple[str, ...] = ()  # replicas that get no new requests until undone
    removed: bool = False
    # The service whose gateway serves this one's model. Unset: its own; then the field is not written, so that a
    # controller of the version before reads the file.
    shared_gateway: str | msgspec.UnsetType = msgspec.field(default=msgspec.UNSET, name="gateway_service")

    @property
    def gateway_service(self) -> str:
        """The service whose gateway serves this one's model; '': its own."""
        return self.shared_gateway or ""

    def updated(self, **fields: Any) -> ServiceSpec:
        """The next generation, with other values in these fields."""
        return msgspec.structs.replace(self, generation=self.generation + 1, **fields)
