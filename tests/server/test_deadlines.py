"""A server that knows its machine: what cannot be in time is refused at once, and steps are compared with the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from servers_for_tests import RunningServer, running_server

from powerband.folders import cache_directory
from powerband.spec.hardware.catalog import write_profile
from powerband.spec.hardware.device import detect_cpu
from powerband.spec.hardware.profile import (
    DeviceProfile,
    Evidence,
    HostModel,
    MeasuredMachine,
    Refinement,
    StepTimeModel,
)
from powerband.spec.model.reader import read_model_spec

# A demo model that takes ten milliseconds for each token.
STEPS = StepTimeModel(
    tokens=(1, 2048),
    token_s=(0.01, 20.48),
    rows=(1,),
    row_s=(0.0,),
    positions=(0, 100000),
    position_s=(0.0, 0.0),
    decode_s=0.0,
    chunk_s=0.0,
    pair_s=0.0,
    read_s=0.0,
)
EVIDENCE = Evidence(source="test", error=0.1)
HOST = HostModel(step_s=0.0, per_request_s=0.0, arrival_s=0.0, answer_s=0.0, evidence=EVIDENCE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    cpu, folder = detect_cpu(), tmp_path_factory.mktemp("cache")
    (folder / "kernels").symlink_to(cache_directory() / "kernels")  # compiled already
    spec = read_model_spec(Path("src/powerband/demo"))
    profile = DeviceProfile(
        name="local",
        kind="cpu",
        architecture="cpu",
        memory_bytes=2**34,
        bandwidth_bytes_per_s=30e9,
        peak_flops_per_s={"16bit": 1e12},
        multiprocessors=1,
        machine=MeasuredMachine(name=cpu.name, cores=cpu.cores, threads=1, date="2026-11-21"),
        refinements=(Refinement(model=spec.shape_digest, name="demo", steps=STEPS, host=HOST, evidence=EVIDENCE),),
    )
    write_profile(profile, folder / "profiles" / "local.yaml")
    flags = ("--threads", "1", "--kv-cache-memory", "16MiB", "--dtype", "bfloat16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POWERBAND_CACHE", str(folder))
        with running_server(*flags, command=("-m", "powerband", "serve", "demo", "--port"), timeout_s=90) as running:
            yield running


def test_a_first_token_that_cannot_be_in_time_is_refused(server: RunningServer) -> None:
    body = {"prompt": [300] * 200, "max_tokens": 2, "temperature": 0}
    refused = server.post("/v1/completions", **body, deadline_s=1.5)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "deadline_infeasible"
    assert "would come 0.5" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1
    assert server.post("/v1/completions", **body, deadline_s=3).status_code == 200
    assert server.post("/v1/completions", **body).status_code == 200
    assert server.figure('powerband_requests_refused_total{engine="0",model_name="demo",reason="deadline_inf') == 1


def test_steps_are_compared_with_what_was_predicted(server: RunningServer) -> None:
    server.post("/v1/completions", prompt="The", max_tokens=40, temperature=0, ignore_eos=True)
    name = "powerband_step_residual_ratio"
    server.until(lambda: server.figure(f"{name}_count") >= 4)
    mean = server.figure(f"{name}_sum") / server.figure(f"{name}_count")
    assert 0 < mean < 1  # it is not that slow
    assert f"vllm:{name}" not in server.http.get("/metrics").text
