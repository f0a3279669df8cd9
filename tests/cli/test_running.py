"""`powerband generate` and `powerband serve` as processes: results, signals, exit codes."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from powerband.cli.main import main

ENVIRONMENT = {**{k: v for k, v in os.environ.items() if not k.startswith("POWERBAND_")}, "OMP_NUM_THREADS": "1"}
SMALL = ["--threads", "1", "--max-model-len", "256", "--kv-cache-memory", "16MiB"]


def powerband(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "powerband", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT, **options)


def test_generate_streams_text_to_stdout_and_reads_stdin() -> None:
    shown = powerband("generate", "demo", "--prompt", "-", "--max-tokens", "8", *SMALL, input="What is 2 plus 2?")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.strip()


def test_generate_as_json_is_repeatable_and_counts_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    reports = []
    for _ in range(2):
        assert main(["generate", "demo", "--prompt", "def add(", "--raw", "--max-tokens", "5", "--json", *SMALL]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0]["text"] == reports[1]["text"] != ""
    assert reports[0]["output_tokens"] == 5
    assert reports[0]["finish_reason"] == "length"
    assert 0 < reports[0]["ttft_s"] < 60


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "demo", "--prompt", ""], 2, "The prompt is empty."),
        (["generate", "demo", "--prompt", "x", "--temperature", "-1"], 2, "temperature is -1.0"),
        (["generate", "--prompt", "x"], 2, "No model was given."),
        (["generate", "demo", "--prompt", "x", "--max-tokens", "999", *SMALL], 2, "The context holds 256 tokens"),
        (["serve"], 2, "No model was given."),
        (["serve", "./no-such-model"], 3, "no-such-model"),
        (["serve", "demo", "--host", "0.0.0.0"], 2, "without an API key would let anyone in"),
        (["serve", "demo", "--api-key-file", "no-such-file"], 3, "no-such-file"),
    ],
)
def test_what_cannot_be_done_is_one_message_and_an_exit_code(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    port = ["--port", "0"] if arguments[0] == "serve" else []
    assert main([*arguments, *port]) == code
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_port_in_use_is_said_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        shown = powerband("serve", "demo", "--port", str(taken.getsockname()[1]))
    assert shown.returncode == 3
    assert shown.stderr.startswith("error: Cannot listen on 127.0.0.1 port")
    assert "--port" in shown.stderr


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "powerband", "serve", "demo", "--port", str(port), *SMALL]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT)
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}/readyz")
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=30):
                return
        except OSError:
            time.sleep(0.05)
    pytest.fail("the server did not become ready")


def test_served_model_answers_and_sigterm_ends_in_order(server: tuple[subprocess.Popen[bytes], str]) -> None:
    process, url = server
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        assert json.load(answer)["data"][0]["id"] == "demo"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0


def test_ctrl_c_ends_a_server_with_130_and_says_so(server: tuple[subprocess.Popen[bytes], str], tmp_path: Path) -> None:
    process, _ = server
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert "Stopping after Ctrl-C (SIGINT): no request is running." in (tmp_path / "log").read_text()


def test_ctrl_c_ends_generate_with_130() -> None:
    command = [sys.executable, "-m", "powerband", "generate", "demo", "--prompt", "x", "--raw", "--threads", "1"]
    long = ["--max-tokens", "1900", "--max-model-len", "2048"]
    process = subprocess.Popen([*command, *long], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert process.stdout is not None
    assert process.stdout.read(1)  # the text has begun
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert b"Traceback" not in error


def test_the_offline_example_runs() -> None:
    example = Path(__file__).resolve().parents[2] / "examples" / "offline.py"
    command = [sys.executable, str(example)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("→") == 2
    assert "answer 1" in shown.stdout


def test_the_bench_example_runs_and_leaves_a_report(tmp_path: Path) -> None:
    example = Path(__file__).resolve().parents[2] / "examples" / "bench.py"
    command = [sys.executable, str(example), "--duration", "3s", "--out", str(tmp_path / "result")]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=200, env=ENVIRONMENT, cwd=tmp_path)
    assert "Traceback" not in shown.stderr, shown.stderr
    assert (tmp_path / "result" / "report.html").exists(), shown.stdout + shown.stderr


def test_the_chat_example_streams_an_answer(server: tuple[subprocess.Popen[bytes], str]) -> None:
    example = Path(__file__).resolve().parents[2] / "examples" / "chat.py"
    command = [sys.executable, str(example), "--url", server[1], "--max-tokens", "8"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT, check=True)
    assert re.search(r"assistant  \w.*\n\(\d+ prompt tokens, 8 output tokens\)", shown.stdout)


def test_what_make_demo_and_make_bench_run_needs_no_tool_of_development() -> None:
    for name in ("demo.py", "bench.py"):
        path = Path(__file__).resolve().parents[2] / "examples" / name
        tree = ast.parse(path.read_text())
        imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        imported |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert imported - {*sys.stdlib_module_names, "powerband"} == set(), path.name
