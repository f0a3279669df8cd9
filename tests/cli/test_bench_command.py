"""`powerband bench` as a process, against a scripted server: what it writes, and what its exit codes say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from powerband.bench.report.result_files import read_requests, read_run
from powerband.calibration.client_capacity import ClientCapacity
from powerband.cli.main import main
from powerband.metrics.record import Outcome

ENVIRONMENT = {**{k: v for k, v in os.environ.items() if not k.startswith("POWERBAND_")}, "COLUMNS": "100"}
SHORT = ["--prompt-tokens", "8", "--prefix-tokens", "0", "--output-tokens", "4"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """With a cache of its own, so that no calibration of this machine is read or written."""
    return ENVIRONMENT | {"POWERBAND_CACHE": str(tmp_path_factory.mktemp("cache"))}


@contextmanager
def scripted(**script: float) -> Iterator[str]:
    command = [sys.executable, "-m", "powerband.mock_server.server", "--script", json.dumps(script)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with scripted(ttft_s=0.02, tpot_s=0.005) as url:
        yield url


def bench(
    environment: dict[str, str], *arguments: str, program: Sequence[str] = ("-m", "powerband")
) -> subprocess.CompletedProcess[str]:
    """A busy machine makes a load INVALID, as it should: then it is tried again, up to twice, and nothing is shown."""
    command = [sys.executable, *program, "bench", *arguments]
    for _ in range(3):
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        if "INVALID" not in shown.stdout and "This client cannot drive" not in shown.stderr:
            return shown
    pytest.skip("Other programs keep this machine too busy to measure.")


def test_requests_are_cut_to_the_servers_context_or_refused(environment: dict[str, str], tmp_path: Path) -> None:
    with scripted(ttft_s=0.01, tpot_s=0.001, max_model_len=512) as url:
        load = ["--workload", "rag", "--rate", "20", "--requests", "30", "--out", str(tmp_path / "run")]
        shown = bench(environment, url, *load)
        assert "30 of 30 requests are longer than the context of 512 tokens" in shown.stderr
        report = read_run(tmp_path / "run")
        assert report.workload["max_model_len"] == 512
        assert report.points[0].cut is not None
        assert report.points[0].whole.answered == 30
        for line in read_requests(tmp_path / "run", 1)[0]:
            assert line.prompt_tokens + line.output_tokens <= 512
        strict = bench(environment, url, *load, "--strict-lengths")
        assert strict.returncode == 2
        assert "30 of 30 requests are longer than the context of 512 tokens, the longest " in strict.stderr
        smaller = bench(environment, url, *load, "--max-model-len", "128", "--json")
        assert json.loads(smaller.stdout)["workload"]["max_model_len"] == 128


def test_a_load_leaves_a_table_and_three_files(server: str, environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    load = ["--rate", "30", "--duration", "2s", "--slo", "ttft=300ms,tpot=100ms", "--api-key", "hush", *SHORT]
    shown = bench(environment, server, *load, "--out", str(out))
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("PASS")
    assert f"report: {out}/report.html" in shown.stdout
    report = read_run(out)
    assert report.points[0].summary.attainment == 1
    assert len(read_requests(out, 1)[0]) == report.points[0].whole.answered > 20
    assert all("hush" not in file.read_text() for file in out.iterdir())
    again = bench(
        environment, server, "--trace", str(out / "requests.jsonl"), "--json", "--out", str(tmp_path / "again")
    )
    assert json.loads(again.stdout)["points"][0]["whole"]["answered"] == report.points[0].whole.answered
    folders = [str(out), str(tmp_path / "again"), str(out)]
    compared = bench(environment, "--compare", *folders, "--out", str(tmp_path / "compared"))
    assert compared.returncode == 0, compared.stderr
    rows = [line for line in compared.stdout.splitlines() if line.lstrip().startswith("TTFT p50")]
    assert len(rows) == 2, compared.stdout  # two runs with the first
    assert (tmp_path / "compared" / "compare.html").exists()
    assert bench(environment, "--compare", str(out)).returncode == 2


def test_other_tools_spellings_are_understood(server: str, environment: dict[str, str], tmp_path: Path) -> None:
    vllm = ["--base-url", server, "--request-rate", "inf", "--num-prompts", "12", "--max-concurrency", "3"]
    sizes = ["--random-input-len", "8", "--random-output-len", "4", "--random-prefix-len", "0"]
    shown = bench(environment, *vllm, *sizes, "--goodput", "ttft:900", "--json", "--out", str(tmp_path))
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["points"][0]["whole"]["answered"] == 12


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["http://127.0.0.1:9", "--duration", "1s"], 3, "No server answers at http://127.0.0.1:9"),
        (["ftp://x"], 2, "is not a server address"),
        (["--sweep", "--find-rate"], 2, "two different things"),
        (["--find-rate"], 2, "needs an --slo"),
        (["--slo", "ttft=fast"], 2, "which is not a duration"),
        (["--attainment", "99%"], 2, "has no effect without --slo"),
        (["--workload", "nonsense"], 2, "Unknown workload 'nonsense'"),
        (["--trace", "no-such-file"], 3, "no-such-file"),
        (["--speedup", "2"], 2, "for a trace"),
        (["--burstiness", "2", "--concurrency", "2"], 2, "open loop"),
        (["--turns", "1", "--think", "2s"], 2, "--think needs --turns"),
        (["--fault", "nonsense"], 2, "Unknown fault 'nonsense'"),
        (["--header", "no colon"], 2, "is not a valid header"),
        (["--extra-body", "[1]"], 2, "not a JSON object"),
        (["--workers", "0"], 2, "workers is 0"),
        (["--plan", "no-such-plan.yaml"], 3, "no-such-plan.yaml"),
        (["--compare", "a", "b"], 2, "This sends no load"),
        (["--warm-up", "60%", "--cool-down", "50%"], 2, "leave nothing to measure"),
    ],
)
def test_what_cannot_be_done_is_one_message_and_an_exit_code(
    server: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.setenv("POWERBAND_CACHE", str(tmp_path))
    named = [] if any("://" in argument for argument in arguments) else [server]
    assert main(["bench", *named, *arguments, "--requests", "3", "--out", str(tmp_path)]) == code
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err


def test_a_rate_can_grow(server: str, environment: dict[str, str], tmp_path: Path) -> None:
    ramp = ["--ramp", "1-10", "--requests", "3", "--duration", "2s"]
    shown = bench(environment, server, *ramp, "--out", str(tmp_path))
    assert shown.returncode == 0, shown.stderr


def test_a_missed_slo_exits_with_1_and_a_broken_server_with_4(environment: dict[str, str], tmp_path: Path) -> None:
    with scripted(ttft_s=0.05) as url:
        load = [url, "--rate", "20", "--duration", "2s", "--slo", "ttft=10ms", *SHORT, "--out", str(tmp_path)]
        shown = bench(environment, *load)
    assert (shown.returncode, shown.stdout[:6]) == (1, "MISSED")
    with scripted(drop_every=1, drop_after_chunks=1) as url:
        shown = bench(environment, url, "--rate", "20", "--duration", "2s", *SHORT, "--out", str(tmp_path))
    assert shown.returncode == 4, shown.stderr


def test_a_client_near_its_ceiling_is_invalid(server: str, environment: dict[str, str], tmp_path: Path) -> None:
    """As if calibration had found that this machine can take five chunks a second."""
    small = ClientCapacity(chunks_per_s=5, requests_per_s=5, cpu_us_per_chunk=1, limited_by="client")
    script = (
        "import powerband.calibration.client_capacity as c, dataclasses, sys; from powerband.cli.main import main; "
        f"c.known_client_capacity = lambda: c.{small}; "
        "sys.exit(main(sys.argv[1:]))"
    )
    load = ["bench", server, "--rate", "20", "--duration", "2s", *SHORT, "--out", str(tmp_path)]
    shown = subprocess.run([sys.executable, "-c", script, *load], capture_output=True, text=True, env=environment)
    assert (shown.returncode, shown.stdout[:7]) == (3, "INVALID"), shown.stderr


def test_a_rate_is_found_on_a_server_of_known_capacity(environment: dict[str, str], tmp_path: Path) -> None:
    """4 slots of 100 ms: 40 requests a second, few enough for a machine that others use, too.

    How near it comes to a capacity is tested in virtual time (bench/test_search.py): here a coarse search is enough.
    """
    script = (
        "import sys, powerband.bench.search as search; from powerband.cli.main import main; "
        "search.RESOLUTION = 1.25; sys.exit(main(sys.argv[1:]))"
    )
    with scripted(ttft_s=0.1, slots=4) as url:
        search = ["--find-rate", "--rate", "20", "--duration", "3s", "--slo", "ttft=400ms"]
        one_token = [*SHORT[:4], "--output-tokens", "1"]
        shown = bench(environment, url, *search, *one_token, "--json", "--out", str(tmp_path), program=("-c", script))
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)["found"]
    assert 20 <= found["requests_per_s"] <= 46  # what is just too much is late at the end only
    assert "MISSED, SLO kept by" in shown.stderr


def test_a_plan_is_checked(server: str, environment: dict[str, str], tmp_path: Path) -> None:
    lengths = {"kind": "fixed", "tokens": 4}
    plan = {
        "version": 1,
        "model": "scripted",
        "workload": {
            "name": "short",
            "arrivals": {"kind": "open", "phases": [{"start": 1, "end": 1, "seconds": None}], "burstiness": 1.0},
            "requests": {"prompt": lengths, "output": lengths},
        },
        "slo": {"ttft_s": 0.3, "attainment": 0.9},
        "promise": {"rate": 30.0},
    }
    path = tmp_path / "plan.yaml"
    for promised, code in ((1.0, 0), (1e6, 1)):
        plan["promise"] = {"rate": 30.0, "output_tokens_per_s": promised}
        path.write_text(yaml.safe_dump(plan))
        shown = bench(environment, server, "--plan", str(path), "--duration", "2s", "--out", str(tmp_path / "run"))
        assert shown.returncode == code, shown.stderr
    assert "promises 1e+06 output tokens" in shown.stderr
    shown = bench(environment, server, "--plan", str(path), "--rate", "3")
    assert (shown.returncode, "set by the plan" in shown.stderr) == (2, True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_load_leaves_what_it_measured_and_no_process(
    number: signal.Signals, code: int, server: str, environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "powerband", "bench", server, "--rate", "20", "--duration", "60s"]
    process = subprocess.Popen([*command, "--out", str(tmp_path)], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    while "sent" not in (line := process.stderr.readline()) or " 0 of" in line:
        assert process.poll() is None
    workers = [int(pid) for task in Path(f"/proc/{process.pid}/task").iterdir() for pid in children_of(task)]
    assert workers
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"interrupted: what was measured until then is in {tmp_path}" in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    run = read_run(tmp_path)
    assert (run.interrupted, run.points[0].verdict) == (True, "INVALID")
    assert "interrupted after" in run.points[0].client.fault
    assert any(sample.outcome is Outcome.OK for sample in read_requests(tmp_path, 1)[0])
    assert (tmp_path / "report.html").exists()


def test_an_interrupted_sweep_keeps_the_rates_that_ended(
    server: str, environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "powerband", "bench", server, "--rates", "5,10", *SHORT, "--duration", "2s"]
    process = subprocess.Popen([*command, "--out", str(tmp_path)], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    while not process.stderr.readline().startswith("· 5/s"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    first = read_run(tmp_path).points[0]
    assert (first.label, first.stopped, "interrupted" in first.client.fault) == ("5/s", False, False)


def test_what_is_interrupted_before_any_load_leaves_no_folder(environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "powerband", "bench", "http://127.0.0.1:9", "--wait", "60s", "--out", str(out)]
    process = subprocess.Popen(command, env=environment)
    while not out.exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert not out.exists()


def test_the_clients_own_limit_of_files_makes_a_load_invalid(environment: dict[str, str], tmp_path: Path) -> None:
    with scripted(ttft_s=1.0, tpot_s=0.001) as url:
        command = [sys.executable, "-m", "powerband", "bench", url, "--concurrency", "100", "--requests", "100", *SHORT]
        shown = subprocess.run(
            ["prlimit", "--nofile=64:64", *command, "--out", str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=120,
            env=environment,
        )
    assert shown.returncode == 3
    [point] = read_run(tmp_path).points
    assert (point.verdict, "requests were not sent" in point.client.fault) == ("INVALID", True)
    assert "ulimit -n" in point.client.fault


def children_of(task: Path) -> list[str]:
    return (task / "children").read_text().split()


def test_runs_that_are_not_there_cannot_be_compared(environment: dict[str, str]) -> None:
    shown = bench(environment, "--compare", "a", "b")
    assert (shown.returncode, "Cannot read a/run.json" in shown.stderr) == (2, True)


def test_definitions_and_faults_are_listed(environment: dict[str, str]) -> None:
    assert "TPOT = (c_m − c_1) / (n − 1)" in bench(environment, "--explain-metrics").stdout
    assert "cancel-storm" in bench(environment, "--fault", "list").stdout


def test_a_fault_says_how_the_server_took_it(server: str, environment: dict[str, str]) -> None:
    shown = bench(environment, server, "--fault", "cancel-storm", "--duration", "1s", "--concurrency", "4")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "others after" in shown.stdout
