"""From a plan to commands on this machine, plans for another machine, and scaled releases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from powerband.errors import EnvironmentFault, UsageError
from powerband.fleet import release
from powerband.fleet.control.instance_specs import build_route, free_devices, pool_revisions, replica_spec
from powerband.fleet.release import ReleaseOptions, build_release, default_served_name
from powerband.fleet.scaling import scaled
from powerband.fleet.service.spec import PoolRelease, Release
from powerband.fleet.targets.base import Instance
from powerband.fleet.targets.local import LocalTarget
from powerband.spec.deployment import Deployment, Replica, ReplicaPool
from powerband.spec.plan import Plan, Promise
from powerband.spec.slo import SLO
from powerband.spec.workload.options import ArrivalOptions, MixOptions, requested_load

MAKING = ReleaseOptions(served_name="demo")


def plan(device: str = "cpu", count: int = 2, **replica: object) -> Plan:
    made = Replica(device=device, **{"max_model_len": 1024, "max_num_seqs": 8, **replica})  # type: ignore[arg-type] # of Replica
    return Plan(
        model="demo",
        workload=requested_load(ArrivalOptions(rate=1.0), MixOptions()).workload,
        slo=SLO(ttft_s=1.0),
        promise=Promise(1.0),
        deployment=Deployment(engine="powerband", pools=(ReplicaPool(replica=made, count=count),)),
    )


def made(**fields: object) -> Release:
    return build_release(plan(**fields), MAKING).release  # type: ignore[arg-type] # of plan


def test_divides_the_cores_among_the_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = replace(release.detect_cpu(), cores=8)
    monkeypatch.setattr(release, "detect_cpu", lambda: cpu)
    found = build_release(plan(count=3), MAKING)
    assert found.release.pools[0].threads == 2
    assert "--threads=2" in found.release.pools[0].command
    assert found.notes == ("2 of 8 cores for each of 3 replicas",)
    many = build_release(plan(count=3), replace(MAKING, threads=4))
    assert "more threads than cores: 12 on 8" in many.notes


def test_the_number_of_replicas_does_not_change_their_revision() -> None:
    two = made()
    assert pool_revisions(scaled(two, ["5"])) == pool_revisions(two)
    assert pool_revisions(made(max_num_seqs=4)) != pool_revisions(two)


def test_replicas_are_asked_for_metrics_where_their_engine_has_them(tmp_path: Path) -> None:
    pool = PoolRelease(count=1, engine="trtllm", command=("true",))
    spec = replica_spec(Release(plan={}, served_name="m", pools=(pool,)), 0, "r1", ())
    started = LocalTarget(tmp_path).start(spec)
    assert spec.metrics_path == started.metrics_path == "/prometheus/metrics"


@pytest.mark.parametrize(
    ("device", "message"), [("L4", "The plan is for L4; this machine has"), ("nonsense", "no device")]
)
def test_refuses_a_plan_for_another_machine(device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "gpu_names", tuple)
    with pytest.raises(UsageError, match=message):
        build_release(plan(device), MAKING)


def test_each_replica_has_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "gpu_names", lambda: ("NVIDIA L4", "Tesla T4", "NVIDIA L4"))
    made = build_release(plan("L4"), MAKING).release
    assert made.gpus == (0, 2)
    first = Instance(id="r1", role="replica", revision="a", pool=0, url="", pid=1, started_at=0.0, devices=(0,))
    assert free_devices(made, 0, []) == (0,)
    assert free_devices(made, 0, [first]) == (2,)
    assert free_devices(made, 0, [first, replace(first, devices=(2,))]) is None
    with pytest.raises(EnvironmentFault, match="1 are free"):
        build_release(plan("L4"), replace(MAKING, gpus_in_use=frozenset({0})))


def test_gpus_that_cuda_visible_devices_hides_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "gpu_names", lambda: ("NVIDIA L4",) * 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    made = build_release(plan("L4"), MAKING).release
    assert made.gpus == (1, 3)
    assert replica_spec(made, 0, "r1", (3,)).env.items() >= {
        ("CUDA_VISIBLE_DEVICES", "3"),
        ("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),  # the order of nvidia-smi
    }
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(EnvironmentFault, match="needs 2 × L4; 1 are free"):
        build_release(plan("L4"), MAKING)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5f2c")
    with pytest.raises(UsageError, match="understands the numbers of nvidia-smi"):
        build_release(plan("L4"), MAKING)


def test_refuses_a_plan_without_a_deployment() -> None:
    with pytest.raises(UsageError, match="no deployment"):
        build_release(replace(plan(), deployment=None), MAKING)


def test_a_folder_is_served_under_its_own_name(tmp_path: Path) -> None:
    assert default_served_name(str(tmp_path)) == tmp_path.name
    assert default_served_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


def test_routes_name_replicas_by_what_they_run_and_change_their_revision_with_it() -> None:
    release = made()
    running = Instance(id="r1", role="replica", revision="a", pool=0, url="http://127.0.0.1:1", pid=1, started_at=0.0)
    model, drained = build_route(release, [running], frozenset()), build_route(release, [running], frozenset({"r1"}))
    assert (model.name, model.rate, model.slo) == ("demo", 1.0, SLO(ttft_s=1.0))
    assert model.replicas[0].max_num_seqs == 8
    assert drained.replicas[0].draining
    assert model.revision != drained.revision


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("x", "not a number"),
        ("0", "not a number"),
        ("5=1", "no pool '5'"),
        ("a=1", "no pool"),
        ("1001", "not a number"),
    ],
)
def test_refuses_an_invalid_number_of_replicas(asked: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        scaled(made(), [asked])
