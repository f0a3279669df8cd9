"""`powerband plan`: from a config.json to a plan that can be simulated; and what is told when there is none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model_configs import model_config
from powerband.cli.main import main
from powerband.spec.plan import read_plan

SMALL = model_config(2048, 16, intermediate=8192, max_position_embeddings=4096, tie_word_embeddings=True)
ASKED = ("--devices", "L4", "--max-devices", "2", "--rate", "2", "--engine", "vllm", "--quantization", "none")
LIGHT = ("--prompt-tokens", "200", "--output-tokens", "20", "--workers", "1")


@pytest.fixture(scope="module", autouse=True)
def short_simulations() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("powerband.planner.search._SECONDS", 15.0)
        patch.setattr("powerband.planner.search._MIN_REQUESTS", 40)
        yield


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return str(tmp_path)


def plan(model: str, *options: str) -> int:
    return main(["plan", model, *ASKED, *LIGHT, *options])


def test_a_plan_is_recommended_written_and_can_be_simulated(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.yaml"
    assert plan(model, "--slo", "ttft=1s@p95,tpot=60ms@p95", "-o", str(file)) == 0
    shown = capsys.readouterr().out
    assert "Why" in shown
    assert "Frontier" in shown
    made = read_plan(file)
    assert made.deployment is not None
    assert made.promise.rate == 2.0
    assert made.predicted["ttft_s"].low <= made.predicted["ttft_s"].value <= made.predicted["ttft_s"].high < 1.0
    assert made.cost is not None
    assert made.cost.machines == {"gcp g2-standard-4": 1}
    assert main(["simulate", str(file), "--requests", "100", "--out", str(tmp_path / "run")]) == 0


def test_plan_names_a_model_on_this_machine_by_its_absolute_path(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path.parent)
    file = tmp_path / "plan.yaml"
    for relative in (tmp_path.name, f"./{tmp_path.name}/config.json"):
        assert plan(relative, "-o", str(file)) == 0
        assert read_plan(file).model == str(tmp_path.parent / relative)


def test_the_same_question_has_the_same_answer(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    found: list[dict[str, Any]] = []
    for _ in range(2):
        assert plan(model, "--json") == 0
        found.append(json.loads(capsys.readouterr().out))
        found[-1].pop("seconds")
    assert found[0] == found[1]


def test_when_nothing_keeps_the_slo_the_nearest_is_named(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(model, "--slo", "tpot=1ms@p95") == 1
    assert "Nearest is vLLM on" in capsys.readouterr().out.replace("\n", " ")


def test_a_budget_that_is_too_small_says_what_is_enough(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(model, "--budget", "0.10/h") == 1
    assert "budget of $0.10 an hour is too small" in " ".join(capsys.readouterr().out.split())


def test_what_if_the_device_were_another(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(model, "--json", "--set", "device.price=0.1", "--set", "replica.max_num_seqs=32") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["evaluations"][found["recommended"]]["usd_per_hour"] == pytest.approx(0.1)
    replicas = [pool["replica"] for one in found["evaluations"] for pool in one["pools"]]
    assert {replica["max_num_seqs"] for replica in replicas} == {32}


UNMEASURED = "This machine has not been measured yet."


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--engine tgi", "Unknown engine 'tgi'"),
        ("--workload nope", "There is no workload 'nope'"),
        ("--rate -1", "rate is -1; it must be above 0"),
        ("--rate nan --prompt-tokens 32", "rate is nan"),
        ("--budget little", "budget is 'little'"),
        ("--quantization int3", "Unknown quantization"),
        ("--draft-tokens 2 --acceptance 3", "acceptance is '3'"),
        ("--max-model-len 0", "max_model_len is 0; it must be at least 1"),
        ("--seed -1", "seed is -1"),
        ("--set local.prize=3", "A device has no 'prize'"),
        ("--set M4.price=3", "There is no device 'M4'"),
        ("--devices local,nope", "There is no device 'nope'"),
        ("--prices nope.yaml", "nope.yaml"),
        ("--turns x", "turns is x"),
        ("--workers 0", "workers is 0"),
        ("-o /nowhere/plan.yaml", "no such folder"),
        ("", UNMEASURED),
    ],
)
def test_machine_without_a_calibration_hides_no_other_mistake(
    options: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POWERBAND_DEVICE_PROFILE", str(tmp_path / "none.yaml"))
    rate = [] if "--rate" in options else ["--rate", "1"]
    lengths = [] if "--workload" in options or "--turns" in options else ["--output-tokens", "8"]
    lengths += [] if "--prompt-tokens" in options or "--workload" in options else ["--prompt-tokens", "32"]
    assert main(["plan", "demo", *rate, *lengths, *options.split()]) in (2, 3)
    said = capsys.readouterr().err
    assert sentence in said
    assert (UNMEASURED in said) == (not options)


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--devices", "L5"], 2, "There is no device 'L5'"),
        (["--slo", "ttft=soon"], 2, "not a duration"),
        (["--budget", "little"], 2, "budget is 'little'"),
        (["--engine", "llamacpp"], 2, "Unknown engine 'llamacpp'"),
        (["--quantization", "int3"], 2, "Unknown quantization 'int3'"),
        (["--quantization", "nvfp4"], 2, "no kernels for nvfp4 on ada"),
        (["--set", "device.memory=3"], 2, "A device has no 'memory'. hint: Did you mean memory_bytes?"),
        (["--set", "L4.prize=3"], 2, "Did you mean price?"),
        (["--set", "replica.speed=3"], 2, "A replica has no 'speed'"),
        (["--set", "nonsense"], 2, "set is 'nonsense'"),
        (["--workload", "nothing"], 2, "There is no workload 'nothing'"),
        (["--set", "device.memory_bytes=1e9"], 2, "No deployment of"),
        (["--draft-tokens", "3"], 2, "go together"),
        (["--prompt-tokens", "9000", "--strict-lengths"], 2, "requests are longer than the context of 4,096 tokens"),
        (["--max-model-len", "5000"], 2, "max_model_len is 5000; the model knows 4,096 positions"),
        (["-o", "/nowhere/plan.yaml"], 3, "there is no such folder"),
    ],
)
def test_what_is_wrong_is_told(
    options: list[str], code: int, sentence: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ASKED.index(options[0]) if options[0] in ASKED else len(ASKED)
    arguments = [*ASKED[:at], *ASKED[at + 2 :]]
    light = [] if options[0] in ("--workload", "--prompt-tokens") else [*LIGHT]
    assert main(["plan", model, *arguments, *light, *options]) == code
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_when_nothing_keeps_the_slo_a_rate_and_an_slo_are_named_that_would_be_kept(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--devices", "L4", "--max-devices", "1", "--engine", "vllm", "--quantization", "none", *LIGHT]
    load = ["--rate", "200", "--slo", "ttft=300ms@p95,tpot=50ms@p95"]
    assert main(["plan", model, *asked, *load]) == 1
    text = " ".join(capsys.readouterr().out.split())
    rate = re.search(r"At ([\d.e+]+) of the 200 requests/s it would: --rate \1 ", text)
    assert rate is not None, text
    assert main(["plan", model, *asked, "--rate", rate[1], *load[2:]]) == 0
    capsys.readouterr()
    load = ["--rate", "2", "--slo", "ttft=1ms@p95,tpot=1ms@p95"]
    assert main(["plan", model, *asked, *load]) == 1
    text = " ".join(capsys.readouterr().out.split())
    slo = re.search(r"At 2 requests/s this SLO would be kept: --slo (\S+)", text)
    assert slo is not None, text
    assert main(["plan", model, *asked, "--rate", "2", "--slo", slo[1]]) == 0


def test_where_nothing_is_possible_every_kind_of_reason_is_shown(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--devices", "L4,A100-80G", "--max-devices", "2", "--replicas", "3", "--rate", "2", *LIGHT]
    assert main(["plan", model, *asked]) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert "3 of 1 devices have no room: at most 2 may be used" in text
    assert "3 of 2 devices have no room: at most 2 may be used" in text
    assert "it needs a checkpoint that was quantized so" in text


def test_a_plan_records_the_context_to_which_its_requests_are_cut(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.yaml"
    asked = ["--devices", "L4", "--workload", "chat", "--rate", "0.2", "--max-model-len", "1024"]
    assert main(["plan", model, *asked, "--slo", "ttft=9s,tpot=1s", "-o", str(path), "--workers", "1"]) == 0
    assert "requests are longer than the context of 1,024 tokens" in " ".join(capsys.readouterr().out.split())
    known = read_plan(path)
    assert known.workload.max_model_len == 1024
    assert known.deployment is not None
    assert known.deployment.pools[0].replica.max_model_len == 1024
    assert main(["simulate", str(path), "--requests", "60", "--json", "--out", str(tmp_path / "run")]) == 0
    point = json.loads(capsys.readouterr().out)["points"][0]
    assert point["errors"] == []
    assert (
        point["schedule_digest"] == replace(known.workload, arrivals=known.arrivals).draw(0, num_requests=60).digest()
    )


@pytest.mark.parametrize(
    ("content", "options", "what"),
    [
        ("name: mine", ["--prompt-tokens", "32"], "already describes the requests"),
        ("name: mine\nrequests: {trace: {file: day.csv}}", [], "--workload TRACE"),
    ],
)
def test_a_workload_in_yaml_says_it_all(
    content: str, options: list[str], what: str, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    told = ["plan", model, "--devices", "L4", "--rate", "1", "--workload", str(tmp_path / "mine.yaml"), *options]
    assert main(told) == 2
    assert what in capsys.readouterr().err


def test_an_architecture_that_is_not_known_and_a_missing_rate(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = tmp_path / "strange.json"
    strange.write_text(json.dumps({**SMALL, "model_type": "mamba"}))
    assert plan(str(strange)) == 2
    assert "'mamba'" in capsys.readouterr().err
    assert main(["plan", model, "--devices", "L4"]) == 2
    assert "How many requests a second?" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "a,b\n1,2\n"])
def test_an_empty_or_broken_trace(content: str, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(content)
    assert main(["plan", model, *ASKED, "--workload", str(trace)]) == 2
    assert str(trace.name) in capsys.readouterr().err
