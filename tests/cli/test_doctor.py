"""`powerband doctor`: what this machine has, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from powerband.cli import doctor
from powerband.cli.main import main
from powerband.engine.kernels.cpu import library
from powerband.engine.this_machine import compute_device
from powerband.spec.settings import EngineSettings

Output = pytest.CaptureFixture[str]


def test_report_is_complete_and_finds_nothing_wrong_here(capsys: Output) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["cores"] >= 1
    assert 10**8 < report["machine"]["read_bandwidth_bytes_per_s"] < 10**13
    assert report["compute"]["device"] in ("cpu", "cuda")
    assert report["compute"]["attention"]
    assert report["versions"]["torch"]
    assert not any(finding["fatal"] for finding in report["findings"])


def test_missing_package_is_named_and_ends_with_3(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "package_versions", lambda: {"torch": "2.13.0", "uvicorn": None})
    assert main(["doctor"]) == 3
    assert "The package uvicorn is not installed.\n    pip install uvicorn" in capsys.readouterr().out


def test_without_torch_doctor_says_what_is_not_possible_and_which_extra_brings_it(
    capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "package_versions", lambda: {"torch": None, "uvicorn": "0.35"})
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "torch is not installed; it is needed for serve, generate" in shown
    assert "\n    pip install 'powerband[serve]'\n" in shown
    assert "compute\n" not in shown, "what needs torch is left out"


def test_a_machine_that_was_not_calibrated_is_a_finding(
    capsys: Output, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("POWERBAND_DEVICE_PROFILE", str(tmp_path / "local.yaml"))
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "This machine has not been measured yet. 'powerband plan' without --devices" in shown
    assert "Measure it, in two minutes on a CPU: powerband calibrate" in shown


def test_kernels_that_are_not_compiled_yet_are_a_finding_and_stay_so(
    capsys: Output, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("POWERBAND_CACHE", str(tmp_path))
    assert main(["doctor"]) == 0
    assert "not compiled yet: the first start does it, in a minute.\n    powerband doctor --compile" in (
        capsys.readouterr().out
    )
    assert not list(tmp_path.rglob("*.so"))


def test_compile_only_compiles(capsys: Output, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def compiled(tier: str, _progress: object = None) -> Path:
        return tmp_path / f"{tier}.so"

    monkeypatch.setattr(library, "build", compiled)
    assert main(["doctor", "--compile"]) == 0
    assert str(compiled(library.own_tier())) in capsys.readouterr().out
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert main(["doctor", "--compile"]) == 3
    assert "No C++ compiler was found" in capsys.readouterr().err


def test_gpu_that_torch_cannot_use_is_a_finding(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr("powerband.diagnostics.has_gpu_nodes", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["doctor"]) == 0
    assert "This machine has a GPU, but torch" in capsys.readouterr().out


def test_no_compiler_is_a_finding(capsys: Output, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "load", library.load.__wrapped__)
    monkeypatch.setenv("POWERBAND_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "No C++ compiler was found" in shown
    assert "apt install g++" in shown


def test_a_cache_that_cannot_be_written_is_a_finding_and_no_compiler_is_asked_for(
    capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "load", library.load.__wrapped__)
    monkeypatch.setenv("POWERBAND_CACHE", "/proc/nowhere")  # which not even root can write
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "The CPU kernels cannot be compiled into /proc/nowhere/kernels/" in shown
    assert "Set POWERBAND_CACHE to a folder that this user can write. The kernels are compiled" in shown
    assert "apt install" not in shown


def test_asked_device_is_not_looked_for() -> None:
    assert compute_device(EngineSettings(device="cuda")) == "cuda"
    assert compute_device(EngineSettings(device="cpu")) == "cpu"
