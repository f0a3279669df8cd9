"""From a release to the members that carry it out: what to start, where to probe it, and the gateway's routes."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from functools import cache

import msgspec

from powerband.fleet.engines.base import read_key
from powerband.fleet.service.spec import GatewaySpec, PoolRelease, Release
from powerband.fleet.service.store import ServiceStore
from powerband.fleet.targets.base import Instance, InstanceSpec
from powerband.gateway.routes import ModelRoute, ReplicaAddress, Routes
from powerband.spec.hardware.device import detect_cpu
from powerband.spec.slo import SLO
from powerband.spec.yaml_codec import as_record

POWERBAND = (sys.executable, "-m", "powerband")
_GATEWAY_READY_PATH = "/livez"


def pool_revisions(release: Release) -> tuple[str, ...]:
    """A name for what a replica of each pool is: it changes when its command does, not with the number of them."""
    return tuple(_digest([pool.command, pool.env]) for pool in release.pools)


def release_revision(release: Release) -> str:
    """A name for all of it."""
    return _digest(msgspec.to_builtins(release))


def gateway_revision(front: GatewaySpec) -> str:
    return _digest(msgspec.to_builtins(front))


def release_slo(release: Release) -> SLO:
    return SLO.from_dict(release.plan["slo"])


def free_devices(
    release: Release, pool: int, replicas: Sequence[Instance], others: frozenset[int] = frozenset()
) -> tuple[int, ...] | None:
    """GPUs that no replica has, enough for one of this pool; () where it needs none, None where there are too few.

    others: those of other services.
    """
    taken = others.union(*(replica.devices for replica in replicas))
    free = [device for device in release.gpus if device not in taken]
    needed = release.pools[pool].gpus
    return tuple(free[:needed]) if len(free) >= needed else None


def excess_threads(release: Release) -> str:
    """Where replicas on the CPU compute with more threads than this machine has cores: how many; else ''."""
    threads, cores = sum(pool.count * (pool.threads or 0) for pool in release.pools), detect_cpu().cores
    return f"{threads} threads on {cores} cores" if threads > cores else ""


def replica_spec(release: Release, pool: int, id: str, devices: tuple[int, ...]) -> InstanceSpec:
    made = release.pools[pool]
    own = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))} if devices else {}
    return InstanceSpec(
        id=id,
        role="replica",
        revision=pool_revisions(release)[pool],
        command=made.command,
        env={**made.env, **own},
        pool=pool,
        ready_path=made.ready_path,
        devices=devices,
    )


def gateway_spec(front: GatewaySpec, folder: ServiceStore, id: str) -> InstanceSpec:
    command = (*POWERBAND, "gateway", f"--host={front.host}", "--port={port}", f"--database={folder.database}")
    return InstanceSpec(
        id=id,
        role="gateway",
        revision=gateway_revision(front),
        command=(*command, f"--auth={front.auth}", *front.arguments),
        host=front.host,
        port=front.port,
        ready_path=_GATEWAY_READY_PATH,
    )


def build_routes(release: Release, replicas: Sequence[Instance], draining: frozenset[str]) -> Routes:
    """What the gateway is to know. A replica of another release counts as one of its pool while it is there."""
    cost = release.plan.get("cost") or {}
    model = ModelRoute(
        name=release.served_name,
        replicas=tuple(_address(release, one, draining) for one in sorted(replicas, key=lambda one: one.id)),
        rate=release.plan["promise"]["rate"],
        slo=release_slo(release),
        usd_per_million_output=float(cost.get("usd_per_million_tokens", 0.0)),
    )
    return Routes(models=(model,), revision=_digest(as_record(model, complete=True)))


def _address(release: Release, running: Instance, draining: frozenset[str]) -> ReplicaAddress:
    pool: PoolRelease = release.pools[min(running.pool, len(release.pools) - 1)]
    return ReplicaAddress(
        id=running.id,
        url=running.url,
        model=release.served_name,
        engine=pool.engine,
        max_num_seqs=pool.max_num_seqs,
        longest_prompt=pool.longest_prompt,
        api_key=replica_key(release.api_key_file),
        draining=running.id in draining,
    )


@cache
def replica_key(file: str) -> str:
    """What the file holds, where there is one. Raises EnvironmentFault."""
    return read_key(file or None)


def _digest(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()[:8]
