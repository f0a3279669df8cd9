"""What an address that cannot be listened on says: which port, why, and who has it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from powerband.errors import EnvironmentFault
from powerband.web import listening

SERVER = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); {}"


@pytest.mark.parametrize("refused", [listening.listen, listening.check_port])
def test_port_in_use_names_the_process_that_has_it(refused: object) -> None:
    command = [sys.executable, "-c", SERVER.format("time.sleep(60)")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        port = int(other.stdout.readline())
        with pytest.raises(EnvironmentFault, match=f"port {port}: Address already in use by pid {other.pid} \\(.*-c"):
            refused("127.0.0.1", port)  # type: ignore[operator] # one of the two functions
        other.kill()


def test_port_of_a_process_that_the_system_does_not_show_is_still_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.net_connections", lambda _kind: [])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentFault, match=f"port {port}: Address already in use\\."):
            listening.listen("127.0.0.1", port)
        assert not listening.is_port_free("127.0.0.1", port)


@pytest.mark.parametrize(("host", "hint"), [("192.0.2.1", "this machine"), ("no.such.invalid", "--host")])
def test_address_of_another_machine_is_no_matter_of_the_port(host: str, hint: str) -> None:
    with pytest.raises(EnvironmentFault) as caught:
        listening.listen(host, 0)
    assert hint in caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may listen on every port")
def test_port_below_1024_is_said_to_be_for_root() -> None:
    with pytest.raises(EnvironmentFault) as caught:
        listening.listen("127.0.0.1", 80)
    assert "1024" in caught.value.hint
