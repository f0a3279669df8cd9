"""The systemd units in the package: systemd accepts them, and what they start exists."""

from __future__ import annotations

import configparser
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from powerband.cli.main import build_app

ROOT = Path(__file__).resolve().parents[1]
UNITS = sorted((ROOT / "src" / "powerband" / "systemd").glob("*.service"))
PROGRAM = "/opt/powerband/bin/powerband"
HARDENING = {
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "RestrictSUIDSGID": "yes",
    "SystemCallFilter": "@system-service",
    "UMask": "0077",
}


def service_of(unit: Path) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # names keep their case
    parser.read_string(unit.read_text())
    return dict(parser["Service"])


def test_there_are_three() -> None:
    assert [unit.stem for unit in UNITS] == ["powerband-gateway", "powerband-serve", "powerband"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_starts_a_command_line_that_exists(unit: Path) -> None:
    program, *words = shlex.split(service_of(unit)["ExecStart"])
    assert program == PROGRAM
    build_app(words[0]).parse_args(words, exit_on_error=False, print_error=False)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_may_do_no_more_than_it_needs_and_is_in_the_documentation(unit: Path) -> None:
    service = service_of(unit)
    assert service["User"] == "powerband"
    assert service.items() >= HARDENING.items()
    assert f"`{unit.name}`" in (ROOT / "docs" / "install.md").read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_finds_nothing_wrong_with_a_unit(unit: Path, tmp_path: Path) -> None:
    """With a program that is here in place of the one that it starts, since systemd looks for it."""
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace(PROGRAM, sys.executable))
    found = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")
