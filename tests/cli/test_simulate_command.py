"""`powerband simulate`: a plan under a load that nobody sends, reported as the load generator reports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from model_configs import LLAMA_8B
from powerband.cli.main import main
from powerband.spec.deployment import Deployment, Replica, ReplicaPool
from powerband.spec.hardware.catalog import load_catalog
from powerband.spec.plan import Plan, Promise, write_plan
from powerband.spec.slo import SLO
from powerband.spec.workload.arrivals import OpenLoop
from powerband.spec.workload.presets import preset
from powerband.spec.workload.workload import Workload


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return Plan(
        model=str(tmp_path / "config.json"),
        workload=Workload(name="chat", arrivals=OpenLoop.at(1.0), requests=preset("chat").mix),
        slo=SLO.parse("ttft=1s,tpot=50ms"),
        promise=Promise(1.0),
        deployment=Deployment(engine="vllm", pools=(ReplicaPool(replica=Replica(device="H100", max_model_len=8192)),)),
    )


def run(plan: Plan, folder: Path, *options: str) -> int:
    write_plan(plan, folder / "plan.yaml")
    return main(["simulate", str(folder / "plan.yaml"), "--out", str(folder / "run"), *options])


def test_the_plans_own_load_is_played_and_judged(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(plan, tmp_path, "--json") == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    point = report["points"][0]
    assert point["verdict"] == "PASS"
    assert point["offered"] == {"kind": "rate", "value": 1.0}
    assert report["workload"]["name"] == "chat"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json", "requests.jsonl", "report.html"}


def test_no_request_is_longer_than_the_plans_context(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = replace(
        plan,
        deployment=Deployment(engine="vllm", pools=(ReplicaPool(replica=Replica(device="H100", max_model_len=1024)),)),
    )
    assert run(short, tmp_path, "--json") == 0
    shown = capsys.readouterr()
    assert "requests are longer than the context of 1,024 tokens" in shown.err
    report = json.loads(shown.out)
    assert report["workload"]["max_model_len"] == 1024
    assert report["points"][0]["errors"] == []
    assert run(short, tmp_path, "--strict-lengths") == 2
    # What flags say instead of the plan's workload is cut alike.
    assert run(short, tmp_path, "--prompt-tokens", "2000", "--output-tokens", "50", "--json") == 0
    assert json.loads(capsys.readouterr().out)["points"][0]["errors"] == []


def test_a_trace_is_played_and_equal_seeds_give_equal_results(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:17:{second:02d}.0,{200 + 7 * second},{10 + second}" for second in range(40)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")
    found = []
    for _ in range(2):
        assert run(plan, tmp_path, "--trace", str(trace), "--json") == 0
        found.append(json.loads(capsys.readouterr().out)["points"])
    assert found[0] == found[1]
    lines = (tmp_path / "run" / "requests.jsonl").read_text().splitlines()
    assert len(lines) == 40
    assert json.loads(lines[-1])["output_tokens"] == 49


def test_a_missed_slo_is_exit_1(plan: Plan, tmp_path: Path) -> None:
    strict = replace(plan, slo=SLO.parse("tpot=1ms"))
    assert run(strict, tmp_path, "--requests", "20") == 1


@pytest.mark.parametrize(
    ("change", "code", "sentence"),
    [
        ({"deployment": None}, 2, "but no deployment"),
        ({"model": "/nowhere/config.json"}, 3, "/nowhere/config.json"),
        (
            {
                "deployment": Deployment(
                    engine="vllm", pools=(ReplicaPool(replica=Replica(device="T4", max_model_len=8192)),)
                )
            },
            3,
            "does not fit: needs",
        ),
        (
            {
                "deployment": Deployment(
                    engine="vllm", pools=(ReplicaPool(replica=Replica(device="X", max_model_len=64)),)
                )
            },
            2,
            "There is no device 'X'",
        ),
    ],
)
def test_what_cannot_be_simulated_is_told(
    change: dict[str, Any],
    code: int,
    sentence: str,
    plan: Plan,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(replace(plan, **change), tmp_path) == code
    assert sentence in capsys.readouterr().err


def test_the_devices_may_be_described_or_changed(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def gap_s(*options: str) -> float:
        assert run(plan, tmp_path, "--json", "--max-requests", "20", "--seed", "1", *options) in (0, 1)
        capsys.readouterr()
        first = json.loads((tmp_path / "run" / "requests.jsonl").read_text().splitlines()[0])["chunk_times_s"]
        return float(first[1] - first[0])

    usual = gap_s()
    assert gap_s("--set", "device.bandwidth_bytes_per_s=3e11") > 1.5 * usual
    described = load_catalog().find("H100").as_dict() | {"name": "H100"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(described))
    assert gap_s("--devices", str(tmp_path / "mine.yaml")) == pytest.approx(usual)


@pytest.mark.parametrize(
    ("options", "what"),
    [(("--devices", "L4"), "is not among L4"), (("--set", "replica.max_num_seqs=4"), "Change it in the plan's file")],
)
def test_devices_that_are_not_the_plans(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], what: str
) -> None:
    assert run(plan, tmp_path, *options) == 2
    assert what in capsys.readouterr().err
