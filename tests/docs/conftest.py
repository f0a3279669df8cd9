"""A network for each page."""

from __future__ import annotations

import shutil
import subprocess

import pytest


@pytest.fixture(scope="session")
def own_network() -> list[str]:
    """Pages name ports: in a network of their own, no other test's server has them. []: this user may not make one."""
    for unshare in (["unshare", "--net"], ["unshare", "--map-root-user", "--net"]):
        inside = [*unshare, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        if shutil.which("ip") and subprocess.run([*inside, "true"], capture_output=True, check=False).returncode == 0:
            return inside
    return []
