"""The runner of a page says which command failed and how, and leaves nothing running."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_page import processes_of

RUNNER = Path(__file__).with_name("run_page.py")
IN_THE_BACKGROUND = "sleep 600 >/dev/null 2>&1 &"


def _page(tmp_path: Path, command: str) -> list[str]:
    page = tmp_path / "page.md"
    page.write_text(f"Text.\n\n```\n{command}\n```\n")
    return [sys.executable, str(RUNNER), str(page), str(tmp_path / "machine")]


def test_a_command_that_fails_is_named_with_its_exit_code_and_the_end_of_its_output(tmp_path: Path) -> None:
    command = f"echo $(seq 1000 2000); {IN_THE_BACKGROUND} exit 7"
    done = subprocess.run(_page(tmp_path, command), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"$ {command}" in done.stdout
    assert "page.md:4: exit code 7" in done.stdout
    assert done.stdout.rstrip().endswith(" 2000")
    assert not processes_of(tmp_path / "machine/home")


@pytest.mark.parametrize(("command", "code"), [("echo done", 0), (f"echo done; {IN_THE_BACKGROUND}", 1)])
def test_commands_that_leave_a_process_fail(tmp_path: Path, command: str, code: int) -> None:
    done = subprocess.run([*_page(tmp_path, command), "--ends-s", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout
    assert ("sleep 600" in done.stdout.partition("processes are left")[2]) == bool(code)
    assert not processes_of(tmp_path / "machine/home")


def test_a_run_that_is_stopped_ends_what_it_has_started(tmp_path: Path) -> None:
    process = subprocess.Popen(_page(tmp_path, "echo started; sleep 600"), stdout=subprocess.PIPE)
    while not any("sleep 600" in command for command in processes_of(tmp_path / "machine/home").values()):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    process.communicate()
    assert process.returncode != 0
    assert not processes_of(tmp_path / "machine/home")
