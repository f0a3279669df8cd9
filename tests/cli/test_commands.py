"""The `powerband` command as a user meets it: output, messages, exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from powerband.cli import main as cli
from powerband.cli.main import main

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("POWERBAND_")]:
        monkeypatch.delenv(name)


def test_config_show_prints_value_and_origin(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERBAND_BLOCK_SIZE", "16")
    assert main(["config", "show", "some/model", "--max-num-seqs", "7", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["model"] == {"value": "some/model", "origin": "command line"}
    assert shown["max_num_seqs"] == {"value": 7, "origin": "command line"}
    assert shown["block_size"] == {"value": 16, "origin": "environment (POWERBAND_BLOCK_SIZE)"}
    assert shown["port"] == {"value": 8000, "origin": "default"}


def test_config_show_is_a_table_for_people(capsys: Output) -> None:
    assert main(["config", "show", "--no-enable-prefix-caching"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"enable_prefix_caching +False +command line", next(x for x in lines if "prefix_caching" in x))


def test_config_show_has_what_the_model_says_of_generating(capsys: Output) -> None:
    assert main(["config", "show", "demo", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows["eos_token_ids"]["value"] == [2, 0]
    assert (rows["temperature"]["value"], rows["top_p"]) == (0.0, {"value": 1.0, "origin": "default"})
    assert rows["temperature"]["origin"].endswith("demo/generation_config.json")
    assert main(["config", "show", "demo", "--generation-config", "off", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["temperature"] == {"value": 1.0, "origin": "default"}


def test_config_show_keeps_the_key_to_itself(capsys: Output) -> None:
    assert main(["config", "show", "--api-key", "sk-very-secret"]) == 0
    printed = capsys.readouterr()
    assert "sk-very-secret" not in printed.out + printed.err
    assert "(set, not shown)" in printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serv"], "Did you mean 'powerband serve'"),
        (["config", "show", "--max-num-seq", "3"], "Did you mean --max-num-seqs?"),
        (["config", "show", "--max-num-seqs", "many"], '"many"'),
        (["config", "show", "--max-num-seqs", "0"], "max_num_seqs is 0; it must be at least 1."),
        (["config", "show", "--dtype", "int8"], '"float32"'),
        (["config", "show", "--enforce-eager", "--device", "cpu"], "enforce_eager would have no effect"),
        (["config", "show", "one", "two"], "Unexpected: two."),
        (["config", "show", "--max-num-seq=3"], "Did you mean --max-num-seqs?"),
        (["serve", "--model", "demo"], "Write: powerband serve MODEL"),
        (["serve", "demo", "--port", "99999"], "port is 99999; it must be between 0 and 65535."),
    ],
)
def test_mistakes_end_with_2_and_one_plain_message(capsys: Output, arguments: list[str], message: str) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert len(printed.err.splitlines()) <= 3


def test_missing_settings_file_ends_with_3(capsys: Output, tmp_path: Path) -> None:
    assert main(["config", "show", "--config", str(tmp_path / "none.yaml")]) == 3
    assert "none.yaml: No such file" in capsys.readouterr().err


def test_serve_has_at_most_50_options(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # so that no name is broken over two lines
    assert main(["serve", "--help"]) == 0
    options = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", capsys.readouterr().out)) - {"help"}
    options -= {option for option in options if option.startswith("no-") and option[3:] in options}
    assert "max-num-batched-tokens" in options
    assert 30 < len(options) <= 50


def test_interrupt_ends_with_130(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert main(["doctor"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_defect_of_ours_is_short_and_leaves_its_traceback_in_a_file(
    capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: list[str]) -> int:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(cli, "_run", broken)
    assert main(["doctor"]) == 4
    error = capsys.readouterr().err
    assert "Powerband failed unexpectedly: ZeroDivisionError: a defect" in error
    assert "Traceback" not in error
    log = Path(re.search(r"is in (\S+);", error)[1])  # type: ignore[index]  # no match is a failure, too
    assert "Traceback" in log.read_text()
    log.unlink()
    monkeypatch.setenv("POWERBAND_DEBUG", "1")
    assert main(["doctor"]) == 4
    assert "Traceback" in capsys.readouterr().err


def test_reader_that_leaves_early_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "powerband", "config", "show"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=30) == 0
    process.stderr.close()


def test_version() -> None:
    shown = subprocess.run([sys.executable, "-m", "powerband", "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"powerband \d+\.\d+\.\d+\n", shown.stdout)


@pytest.mark.parametrize("command", ["status", "doctor", "devices", "keys list", "version", "bench --explain-metrics"])
def test_an_unknown_variable_is_an_error_of_every_command(
    command: str, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POWERBAND_PROT", "9000")
    assert cli.main(command.split()) == 2
    assert "The environment variable POWERBAND_PROT is not one that Powerband knows." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("bench --rate -1", "--rate is -1; it must be above 0"),
        ("bench --rate 0", "--rate is 0; it must be above 0"),
        ("bench --concurrency 0", "--concurrency is 0; it must be between 1 and"),
        ("bench --requests -1", "--requests is -1; it must be 1 or more"),
        ("bench --duration -3s", "--duration needs a value."),
    ],
)
def test_a_value_out_of_bounds_is_refused_with_the_options_name(command: str, said: str, capsys: Output) -> None:
    assert cli.main(command.split()) == 2
    assert said in capsys.readouterr().err


def test_a_file_that_is_no_plan_is_not_taken_for_a_model(capsys: Output, tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text("#!/bin/sh\n")
    assert cli.main(["deploy", str(script)]) == 2
    assert "is a file, and no plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("plan", "MODEL is missing."),
        ("generate demo", "--prompt is missing."),
        ("calibrate -o {folder}", "Is a directory"),
        ("bench http://127.0.0.1:9 --out {file}", "it is a file, not a folder"),
        ("bench http://127.0.0.1:9 --out /proc/none/runs", "Cannot write results to /proc/none/runs"),
        ("keys list --url http://127.0.0.1:9 --admin-key-file {file}", "it is empty"),
        ("keys list --url http://127.0.0.1:9 --admin-key-file {folder}", "Is a directory"),
        ("keys list --url http://127.0.0.1:9 --admin-key-file {bytes}", "it holds no key"),
    ],
)
def test_a_missing_empty_or_wrong_file_is_said_in_a_sentence(
    command: str, said: str, capsys: Output, tmp_path: Path
) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "bytes"
    empty.touch()
    binary.write_bytes(b"\x00\xff")
    assert cli.main(command.format(folder=tmp_path, file=empty, bytes=binary).split()) in (2, 3)
    shown = capsys.readouterr().err
    assert said in shown
    assert not re.search(r"Errno|Traceback|codec|unexpectedly", shown)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("stop", "remove"), ("rm", "remove"), ("ps", "status"), ("run", "serve"), ("benhc", "bench"), ("key", "keys")],
)
def test_an_unknown_command_names_the_one_that_is_meant(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([typed]) == 2
    shown = capsys.readouterr().err
    assert f"Unknown command: {typed}." in shown
    assert f"Did you mean 'powerband {meant}'?" in shown


def test_a_folder_that_can_keep_no_state_is_refused_before_a_plan_is_searched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def search(*_: object, **__: object) -> None:
        raise AssertionError("minutes of planning")

    monkeypatch.setenv("POWERBAND_STATE", "/proc/nowhere")
    monkeypatch.setattr("powerband.cli.service.deploy._find_plan", search)
    assert main(["deploy", "demo", "--rate", "1", "--slo", "ttft=1s"]) == 3
    shown = capsys.readouterr().err
    assert "Cannot keep state in /proc/nowhere/demo" in shown
    assert "Set POWERBAND_STATE to a folder that this user can write." in shown
