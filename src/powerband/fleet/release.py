"""From a plan to a release for this machine: the engine's command lines, threads, GPUs; refused where it cannot be."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from powerband.errors import EnvironmentFault, UsageError
from powerband.fleet.engines import LaunchRequest, engine_adapter
from powerband.fleet.service.spec import PoolRelease, Release
from powerband.spec.deployment import Deployment, ReplicaPool
from powerband.spec.hardware.catalog import LOCAL, load_catalog, local_profile
from powerband.spec.hardware.device import detect_cpu
from powerband.spec.hardware.profile import DeviceProfile
from powerband.spec.plan import Plan

_PORT = "{port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseOptions:
    """served_name: in the API. api_key_file: of the key that replicas want; '': none. executable: of the engine; ():
    the usual. taken_gpus: by other services. threads: of a replica on a CPU; None: as the machine is divided.
    """

    served_name: str
    api_key_file: str = ""
    executable: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    taken_gpus: frozenset[int] = frozenset()
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class BuiltRelease:
    """notes: what was chosen, for people."""

    release: Release
    notes: tuple[str, ...]


def make_release(plan: Plan, making: ReleaseOptions) -> BuiltRelease:
    """Raises UsageError for a plan for another machine, EnvironmentFault where an engine or a GPU is missing."""
    if plan.deployment is None:
        raise UsageError(
            "This plan says what is promised, not what to run.",
            hint="'powerband plan MODEL -o plan.yaml' makes one that does.",
            param="plan",
        )
    deployment = plan.deployment
    profiles = [_device(pool.replica.device) for pool in deployment.pools]
    on_cpu = [profile is None or profile.kind == "cpu" for profile in profiles]
    if len(set(on_cpu)) > 1:
        raise UsageError("Pools on CPUs and on GPUs at once are not for one machine.", param="plan")
    threads, notes = _threads(deployment, profiles, making.threads) if on_cpu[0] else (None, [])
    gpus: tuple[int, ...] = ()
    if not on_cpu[0]:
        gpus = _gpus(deployment, profiles, making.taken_gpus)
        notes = [f"GPUs {', '.join(map(str, gpus))}"]
    model = str(Path(plan.model).expanduser().absolute()) if Path(plan.model).expanduser().is_dir() else plan.model
    release = Release(
        plan=plan.as_dict(),
        served_name=making.served_name,
        pools=tuple(_pool(deployment, pool, model, threads, making) for pool in deployment.pools),
        gpus=gpus,
        api_key_file=making.api_key_file,
    )
    return BuiltRelease(release, tuple(notes))


def default_served_name(model: str) -> str:
    """A folder's own name, or the model's as it is."""
    path = Path(model).expanduser()
    return path.absolute().name if path.is_dir() else model


def _pool(
    deployment: Deployment, pool: ReplicaPool, model: str, threads: int | None, making: ReleaseOptions
) -> PoolRelease:
    engine = engine_adapter(deployment.engine)
    made = engine.command(
        LaunchRequest(
            model=model,
            replica=pool.replica,
            port=_PORT,
            served_name=making.served_name,
            api_key_file=making.api_key_file or None,
            threads=threads,
            executable=making.executable,
            extra=making.extra,
        )
    )
    return PoolRelease(
        count=pool.count,
        engine=deployment.engine,
        command=made.command,
        env=dict(made.env),
        ready_path=engine.ready_path,
        max_num_seqs=pool.replica.max_num_seqs,
        longest_prompt=pool.max_prompt_tokens,
        threads=threads,
        gpus=0 if threads is not None else pool.replica.num_devices,
    )


def _device(name: str) -> DeviceProfile | None:
    """Of this machine; None: 'cpu', of which a plan written by hand says no more. Raises UsageError for another's."""
    if name == "cpu":
        return None
    here = local_profile()
    if here is not None and name in (LOCAL, here.name):
        return here
    if name == LOCAL:
        raise EnvironmentFault(
            "The plan is for this machine as it was measured; there is no such measurement.",
            hint="Run 'powerband calibrate' first.",
            param="plan",
        )
    profile = load_catalog().find(name)
    if profile.kind == "cpu" or not any(_is_gpu(profile, found) for found in gpu_names()):
        has = ", ".join(sorted(set(gpu_names()))) or f"{detect_cpu().name}, and no GPU"
        raise UsageError(
            f"The plan is for {name}; this machine has {has}.",
            hint="Plan for this machine: powerband plan MODEL --devices here.",
            param="plan",
        )
    return profile


def _threads(deployment: Deployment, profiles: list[DeviceProfile | None], asked: int | None) -> tuple[int, list[str]]:
    """Of each replica on this machine's cores: as it was measured where that fits, else a fair part of them."""
    cores, replicas = detect_cpu().cores, sum(pool.count for pool in deployment.pools)
    machines = [profile.machine for profile in profiles if profile is not None and profile.machine is not None]
    measured = machines[0].threads if machines else None
    fair = max(cores // replicas, 1)
    threads = asked or (min(measured, fair) if measured else fair)
    each = f"each of {replicas} replicas" if replicas > 1 else "the replica"
    notes = [f"{threads} of {cores} cores for {each}"]
    if measured is not None and measured != threads:
        notes.append(f"the plan was made for replicas with {measured} threads: expect less than it predicts")
    if replicas * threads > cores:
        notes.append(f"that is more than there are: {replicas * threads} threads on {cores} cores")
    return threads, notes


def _gpus(deployment: Deployment, profiles: list[DeviceProfile | None], taken: frozenset[int]) -> tuple[int, ...]:
    found = [
        index
        for index, name in enumerate(gpu_names())
        if any(one is not None and _is_gpu(one, name) for one in profiles)
    ]
    free = tuple(index for index in found if index not in taken)
    if deployment.num_devices > len(free):
        raise EnvironmentFault(
            f"The plan needs {deployment.num_devices} × {deployment.pools[0].replica.device}; {len(free)} are free.",
            hint="Plan with --max-devices, or remove another service.",
            param="plan",
        )
    return free


def gpu_names() -> tuple[str, ...]:
    """As the driver tells them, by index; () where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    told = subprocess.run(
        [program, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False, timeout=30
    )
    return tuple(line.strip() for line in told.stdout.splitlines() if line.strip()) if told.returncode == 0 else ()


def _is_gpu(profile: DeviceProfile, name: str) -> bool:
    """Whether a driver's name ('NVIDIA H100 80GB HBM3') is this device's."""
    if profile.machine is not None:
        return profile.machine.name == name
    words = name.replace("-", " ").casefold().split()
    return any(known.split("-")[0].casefold() in words for known in (profile.name, *profile.aliases))
