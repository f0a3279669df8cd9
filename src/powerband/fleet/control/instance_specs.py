"""What a release needs in order to run: the instances to start, their devices, and the gateway's routes."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import msgspec

from powerband.engines.launch import read_key
from powerband.engines.registry import ADAPTERS
from powerband.fleet.service.spec import GatewaySpec, PoolRelease, Release
from powerband.fleet.service.store import ServiceStore
from powerband.fleet.targets.base import Instance, InstanceSpec
from powerband.gateway.routes import ModelRoute, ReplicaAddress
from powerband.gateway.settings import GatewaySettings
from powerband.renamed import new_names, rename_options
from powerband.spec.hardware.device import detect_cpu
from powerband.spec.quantities import count_text
from powerband.spec.yaml_codec import as_record

POWERBAND = (sys.executable, "-m", "powerband")
_GATEWAY_READY_PATH = "/livez"


def pool_revisions(release: Release) -> tuple[str, ...]:
    """By pool, an identifier of what its replicas run: it depends on their command, not on their number."""
    return tuple(_digest([pool.command, pool.env]) for pool in release.pools)


def release_revision(release: Release) -> str:
    """An identifier of the whole release."""
    return _digest(msgspec.to_builtins(release))


def gateway_revision(gateway: GatewaySpec) -> str:
    """An identifier of the gateway's spec. Uses the old names of renamed options, so a rename needs no restart."""
    before = {new: old for old, new in new_names(GatewaySettings).items()}
    arguments = rename_options(gateway.arguments, before)
    return _digest(msgspec.to_builtins(msgspec.structs.replace(gateway, arguments=arguments)))


def free_devices(
    release: Release, pool: int, replicas: Sequence[Instance], in_use: frozenset[int] = frozenset()
) -> tuple[int, ...] | None:
    """GPUs for one more replica of the pool; () if it needs none, None if too few are free.

    in_use: GPUs of other services.
    """
    taken = in_use.union(*(replica.devices for replica in replicas))
    free = [device for device in release.gpus if device not in taken]
    needed = release.pools[pool].gpus
    return tuple(free[:needed]) if len(free) >= needed else None


def excess_threads(release: Release) -> str:
    """'8 threads on 4 cores' if the replicas on this CPU compute with more threads than it has cores; else ''."""
    threads, cores = sum(pool.count * (pool.threads or 0) for pool in release.pools), detect_cpu().cores
    return f"{count_text(threads, 'thread')} on {count_text(cores, 'core')}" if threads > cores else ""


def replica_spec(release: Release, pool: int, id: str, devices: tuple[int, ...]) -> InstanceSpec:
    made = release.pools[pool]
    visible = {}
    if devices:  # numbered as nvidia-smi does, which is not CUDA's own order where a machine has GPUs of several kinds
        visible = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))}
    return InstanceSpec(
        id=id,
        role="replica",
        revision=pool_revisions(release)[pool],
        command=made.command,
        env={**made.env, **visible},
        pool=pool,
        ready_path=made.ready_path,
        metrics_path=ADAPTERS[made.engine].metrics_path,
        devices=devices,
    )


def gateway_spec(gateway: GatewaySpec, store: ServiceStore, id: str) -> InstanceSpec:
    command = (*POWERBAND, "gateway", f"--host={gateway.host}", "--port={port}", f"--database={store.database}")
    return InstanceSpec(
        id=id,
        role="gateway",
        revision=gateway_revision(gateway),
        command=(*command, f"--auth={gateway.auth}", *gateway.arguments),
        host=gateway.host,
        port=gateway.port,
        ready_path=_GATEWAY_READY_PATH,
    )


def build_route(release: Release, replicas: Sequence[Instance], draining: frozenset[str]) -> ModelRoute:
    """The model's route at the gateway. A replica of an older release counts for the pool with the same index."""
    cost = release.plan.get("cost") or {}
    model = ModelRoute(
        name=release.served_name,
        replicas=tuple(_address(release, one, draining) for one in sorted(replicas, key=lambda one: one.id)),
        rate=release.plan["promise"]["rate"],
        slo=release.slo,
        usd_per_million_output=float(cost.get("usd_per_million_tokens", 0.0)),
    )
    return replace(model, revision=_digest(as_record(model, complete=True)))


def _address(release: Release, replica: Instance, draining: frozenset[str]) -> ReplicaAddress:
    pool: PoolRelease = release.pools[min(replica.pool, len(release.pools) - 1)]
    return ReplicaAddress(
        id=replica.id,
        url=replica.url,
        model=release.served_name,
        engine=pool.engine,
        max_num_seqs=pool.max_num_seqs,
        max_prompt_tokens=pool.max_prompt_tokens,
        api_key=replica_key(release.api_key_file),
        draining=replica.id in draining,
    )


@cache
def replica_key(file: str) -> str:
    """The key in the file; '' without a file. Raises EnvironmentFault."""
    return read_key(file or None)


def _digest(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()[:8]
