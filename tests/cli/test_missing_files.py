"""A file that is not there is said in the same words by every command that reads one."""

from __future__ import annotations

from pathlib import Path

import pytest

from powerband.cli.main import main


@pytest.mark.parametrize(
    "command",
    [
        "deploy NONE.yaml",
        "simulate NONE.yaml",
        "plan demo --rate 1 --prompt-tokens 8 --output-tokens 8 --devices NONE.yaml",
        "plan demo --rate 1 --prompt-tokens 8 --output-tokens 8 --devices L4 --prices NONE.yaml",
        "plan demo --workload NONE.yaml --devices L4",
        "serve demo --port 0 --api-key-file NONE.txt",
        "serve demo --port 0 --config NONE.yaml",
        "gateway --port 0 --routes NONE.yaml",
        "calibrate --from NONE.jsonl",
        "usage --url http://127.0.0.1:9 --admin-key-file NONE.txt",
    ],
)
def test_missing_file_is_said_in_one_wording(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POWERBAND_STATE", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 3
    [named] = [word for word in command.split() if word.startswith("NONE")]
    assert capsys.readouterr().err.startswith(f"error: Cannot read {named}: No such file or directory.\n")
