"""A file that is not there is said in the same words by every command that reads one."""

from __future__ import annotations

import sys
from importlib.resources import files as package_files
from pathlib import Path

import pytest

from powerband.cli.main import main

DEMO = Path(str(package_files("powerband") / "demo"))


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


@pytest.mark.parametrize("command", ["serve", "generate --prompt hello", "eval", "calibrate"])
@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (None, "There is no folder '"),
        ({}, "Cannot read "),
        ({"config.json": '{"model_type": "chatglm"}'}, "model_type 'chatglm' is not supported"),
        ({"config.json": "demo's"}, "holds no safetensors file"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_found_before_torch_is(
    command: str,
    files: dict[str, str] | None,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # the error would be that it is missing
    folder = tmp_path / "model"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text((DEMO / name).read_text() if text == "demo's" else text)
    name, *options = command.split()
    assert main([name, str(folder), *options]) in (2, 3)
    assert sentence in capsys.readouterr().err
