"""Builds a release for this machine from a plan: the engines' commands, threads and GPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Container
from dataclasses import dataclass

from powerband.engines.launch import LaunchRequest
from powerband.engines.registry import ADAPTERS
from powerband.errors import EnvironmentFault, UsageError
from powerband.fleet.service.spec import PoolRelease, Release
from powerband.folders import expand_user
from powerband.spec.deployment import LOCAL, Deployment, ReplicaPool
from powerband.spec.hardware.catalog import load_catalog, local_profile
from powerband.spec.hardware.device import detect_cpu
from powerband.spec.hardware.profile import DeviceProfile
from powerband.spec.plan import Plan, absolute_model
from powerband.spec.quantities import count_text

_PORT = "{port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseOptions:
    served_name: str  # in the API
    api_key_file: str = ""  # contains the replicas' API key; '': they need none
    executable: tuple[str, ...] = ()  # of the engine; (): the default one
    extra: tuple[str, ...] = ()  # more arguments for the engine
    gpus_in_use: frozenset[int] = frozenset()  # by other services
    threads: int | None = None  # of a replica on a CPU; None: the cores are divided among the replicas


@dataclass(frozen=True, slots=True)
class BuiltRelease:
    release: Release
    notes: tuple[str, ...]  # choices made, as sentences for the user


def build_release(plan: Plan, options: ReleaseOptions) -> BuiltRelease:
    """Raises UsageError for a plan for another machine, EnvironmentFault if an engine or a GPU is missing."""
    if plan.deployment is None:
        raise UsageError(
            "This plan has no deployment: it says what is guaranteed, but not what to run.",
            hint="'powerband plan MODEL -o plan.yaml' makes a plan with one.",
            param="plan",
        )
    deployment = plan.deployment
    profiles = [_device(pool.replica.device) for pool in deployment.pools]
    on_cpu = [profile is None or profile.kind == "cpu" for profile in profiles]
    if len(set(on_cpu)) > 1:
        raise UsageError("A plan with pools on CPUs and on GPUs cannot be deployed on one machine.", param="plan")
    threads, notes = _threads(deployment, profiles, options.threads) if on_cpu[0] else (None, [])
    gpus: tuple[int, ...] = ()
    if not on_cpu[0]:
        gpus = _gpus(deployment, profiles, options.gpus_in_use)
        notes = [f"GPUs {', '.join(map(str, gpus))}"]
    model = absolute_model(plan.model)
    release = Release(
        plan=plan.as_dict(),
        served_name=options.served_name,
        pools=tuple(_pool(deployment, pool, model, threads, options) for pool in deployment.pools),
        gpus=gpus,
        api_key_file=options.api_key_file,
    )
    return BuiltRelease(release, tuple(notes))


def default_served_name(model: str) -> str:
    """A folder's own name, or the model id."""
    path = expand_user(model)
    return path.absolute().name if path.is_dir() else model


def _pool(
    deployment: Deployment, pool: ReplicaPool, model: str, threads: int | None, options: ReleaseOptions
) -> PoolRelease:
    adapter = ADAPTERS[deployment.engine]
    made = adapter.command(
        LaunchRequest(
            engine=deployment.engine,
            capabilities=adapter.capabilities,
            model=model,
            replica=pool.replica,
            port=_PORT,
            served_name=options.served_name,
            api_key_file=options.api_key_file or None,
            threads=threads,
            executable=options.executable,
            extra=options.extra,
        )
    )
    return PoolRelease(
        count=pool.count,
        engine=deployment.engine,
        command=made.command,
        env=dict(made.env),
        ready_path=adapter.ready_path,
        max_num_seqs=pool.replica.max_num_seqs,
        max_prompt_tokens=pool.max_prompt_tokens,
        threads=threads,
        gpus=0 if threads is not None else pool.replica.num_devices,
    )


def _device(name: str) -> DeviceProfile | None:
    """The profile of this machine's device; None: 'cpu', as a plan that was written by hand may say. Raises UsageError
    for a device of another machine.
    """
    if name == "cpu":
        return None
    local = local_profile()
    if local is not None and name in (LOCAL, local.name):
        return local
    if name == LOCAL:
        raise EnvironmentFault(
            "The plan is for this machine as calibrated, but there is no calibration.",
            hint="Run 'powerband calibrate' first.",
            param="plan",
        )
    profile = load_catalog().find(name)
    if profile.kind == "cpu" or not any(_is_gpu(profile, found) for found in gpu_names()):
        present = ", ".join(sorted(set(gpu_names()))) or f"{detect_cpu().name}, and no GPU"
        raise UsageError(
            f"The plan is for {name}; this machine has {present}.",
            hint="Plan for this machine: powerband plan MODEL --devices local.",
            param="plan",
        )
    return profile


def _threads(
    deployment: Deployment, profiles: list[DeviceProfile | None], desired: int | None
) -> tuple[int, list[str]]:
    """Threads of each replica: as calibrated if that fits, else an equal share of the cores. Also returns notes."""
    cores, replicas = detect_cpu().cores, sum(pool.count for pool in deployment.pools)
    machines = [profile.machine for profile in profiles if profile is not None and profile.machine is not None]
    calibrated = machines[0].threads if machines else None
    equal_part = max(cores // replicas, 1)
    threads = desired or (min(calibrated, equal_part) if calibrated else equal_part)
    each = f"each of {replicas} replicas" if replicas > 1 else "the replica"
    notes = [f"{threads} of {count_text(cores, 'core')} for {each}"]
    if calibrated is not None and calibrated != threads:
        notes.append(
            f"the plan was made for replicas with {count_text(calibrated, 'thread')}: latencies will differ from it"
        )
    if replicas * threads > cores:
        notes.append(f"more threads than cores: {replicas * threads} on {cores}")
    return threads, notes


def _gpus(deployment: Deployment, profiles: list[DeviceProfile | None], in_use: frozenset[int]) -> tuple[int, ...]:
    found = [
        index
        for index, name in enumerate(gpu_names())
        if index in visible_gpus() and any(one is not None and _is_gpu(one, name) for one in profiles)
    ]
    free = tuple(index for index in found if index not in in_use)
    if deployment.num_devices > len(free):
        raise EnvironmentFault(
            f"The plan needs {deployment.num_devices} × {deployment.pools[0].replica.device}; {len(free)} are free.",
            hint="Plan with --max-devices, remove another service, or name more in CUDA_VISIBLE_DEVICES.",
            param="plan",
        )
    return free


def visible_gpus() -> Container[int]:
    """The GPUs that $CUDA_VISIBLE_DEVICES leaves to deployments: all where it is not set. Raises UsageError."""
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if variable is None:
        return range(sys.maxsize)
    names = [name.strip() for name in variable.split(",") if name.strip()]
    if not all(name.isdecimal() for name in names):
        raise UsageError(
            f"CUDA_VISIBLE_DEVICES is {variable!r}; 'powerband deploy' understands the numbers of nvidia-smi.",
            hint="For example CUDA_VISIBLE_DEVICES=0,2.",
            param="CUDA_VISIBLE_DEVICES",
        )
    return {int(name) for name in names}


def gpu_names() -> tuple[str, ...]:
    """The GPUs as the driver reports them, by index; () without a GPU or driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    result = subprocess.run(
        [program, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False, timeout=30
    )
    return tuple(line.strip() for line in result.stdout.splitlines() if line.strip()) if result.returncode == 0 else ()


def _is_gpu(profile: DeviceProfile, name: str) -> bool:
    """Whether the driver's name ('NVIDIA H100 80GB HBM3') means this device."""
    if profile.machine is not None:
        return profile.machine.name == name
    words = name.replace("-", " ").casefold().split()
    return any(known.split("-")[0].casefold() in words for known in (profile.name, *profile.aliases))
