"""Files that version 0.1.0 wrote can still be read: plans, this machine's profile, and results of loads."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from powerband.bench.report.compare import compare
from powerband.bench.report.result_files import read_requests, read_run
from powerband.cli.main import main
from powerband.renamed import warn_renamed
from powerband.spec.deployment import LOCAL
from powerband.spec.hardware.catalog import local_profile, local_profile_path, read_profile
from powerband.spec.plan import read_plan, write_plan

WRITTEN = Path(__file__).parents[1] / "spec" / "written_by_0_1_0"


@pytest.fixture(autouse=True)
def warnings_again() -> None:
    warn_renamed.cache_clear()  # each is given once per process


def test_a_plan_for_this_machine(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        plan = read_plan(WRITTEN / "plan_local.yaml")
    assert plan.deployment is not None
    [pool] = plan.deployment.pools
    assert pool.replica.device == LOCAL
    assert "the device 'here' is now called 'local'" in caplog.text


def test_a_plan_with_a_pool_for_short_prompts(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.WARNING):
        plan = read_plan(WRITTEN / "plan_mixed.yaml")
    assert plan.deployment is not None
    assert [pool.max_prompt_tokens for pool in plan.deployment.pools] == [2000, None]
    assert "'longest_prompt' is now called 'max_prompt_tokens'" in caplog.text
    caplog.clear()
    write_plan(plan, tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml") == plan
    assert not caplog.text


def test_this_machines_profile_with_its_refinement() -> None:
    profile = read_profile(WRITTEN / "here.yaml")
    assert profile.name == LOCAL
    assert profile.gemm["powerband"]["int8"].overhead_s > 0
    [refinement] = profile.refinements
    assert refinement.name == "demo"
    assert refinement.steps.chunk_s >= 0


def test_this_machines_profile_is_found_under_its_old_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("POWERBAND_DEVICE_PROFILE", raising=False)
    monkeypatch.setenv("POWERBAND_CACHE", str(tmp_path))
    old = tmp_path / "profiles" / "here.yaml"
    old.parent.mkdir()
    shutil.copy(WRITTEN / "here.yaml", old)
    assert local_profile_path() == old
    with caplog.at_level(logging.WARNING):
        monkeypatch.setenv("POWERBAND_HERE", str(tmp_path / "mine.yaml"))
        assert local_profile_path() == tmp_path / "mine.yaml"
    assert "POWERBAND_DEVICE_PROFILE" in caplog.text
    assert local_profile() is None


def test_results_of_a_load() -> None:
    report = read_run(WRITTEN / "run")
    [point] = report.points
    assert point.summary.figures["ttft"].count > 0
    assert len(read_requests(WRITTEN / "run", 1)[0]) == 30
    assert compare(WRITTEN / "run", WRITTEN / "run").points[0].paired


def test_a_plan_for_this_machine_can_be_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = str(WRITTEN / "plan_local.yaml")
    profile = str(WRITTEN / "here.yaml")
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", plan, "--devices", profile, "--requests", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["points"][0]["summary"]["scheduled"] <= 20
