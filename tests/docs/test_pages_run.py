"""Every command of README.md and docs/ works as it stands there, on a fresh machine and on a calibrated one."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_commands import PAGES, blocks

RUNNER = Path(__file__).with_name("run_page.py")
RUNNING = [page for page in PAGES if any(not block.left_out for block in blocks(page))]
DEPENDS_ON_THE_MACHINE = re.compile(r"powerband (calibrate|deploy|plan)\b")
CASES = [
    pytest.param(page, machine, id=f"{page.name}-{machine}")
    for page in RUNNING
    for machine in ("fresh", "calibrated")
    if machine == "calibrated" or any(DEPENDS_ON_THE_MACHINE.search(c) for b in blocks(page) for c in b.commands)
]


@pytest.fixture(scope="session")
def own_network() -> list[str]:
    """Pages name ports: in a network of their own, no other test's server has them. []: this user may not make one."""
    for unshare in (["unshare", "--net"], ["unshare", "--map-root-user", "--net"]):
        inside = [*unshare, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        if shutil.which("ip") and subprocess.run([*inside, "true"], capture_output=True, check=False).returncode == 0:
            return inside
    return []


@pytest.mark.parametrize(("page", "machine"), CASES)
def test_a_page_can_be_typed_from_its_first_command_to_its_last(
    page: Path, machine: str, own_network: list[str], tmp_path: Path
) -> None:
    options = ["--calibrated"] if machine == "calibrated" else []
    command = [*own_network, sys.executable, str(RUNNER), str(page), str(tmp_path / "machine"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
