"""A disk that is really full: what serves goes on, what dies starts again, and nothing half written stays."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from gateways_for_tests import running_gateway

from powerband.errors import EnvironmentFault
from powerband.fleet.service.store import ServiceStore
from powerband.gateway.accounts.accounts import Accounts, has_admin_key
from powerband.gateway.accounts.store import Store


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    descriptor = os.open(disk / "filling", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for size in (4096, 1):
        with contextlib.suppress(OSError):
            while True:
                os.write(descriptor, b"x" * size)
    os.close(descriptor)


def routes(number: int) -> dict[str, object]:
    replica = {"id": f"r{number}", "url": "http://127.0.0.1:1", "model": "m"}
    return {"models": [{"name": "m", "replicas": [replica]}], "revision": str(number)}


def test_a_gateway_takes_routes_and_starts_again(disk: Path) -> None:
    folder = disk / "gateway"
    folder.mkdir()
    with running_gateway(folder) as gateway:
        assert gateway.admin.put("/admin/routes", json=routes(1)).status_code == 200
        fill(disk)
        answer = gateway.admin.put("/admin/routes", json=routes(2))
        assert (answer.status_code, answer.json()["routes"]["revision"]) == (200, "2")
        key = gateway.admin.headers["authorization"]
        gateway.process.kill()
        gateway.process.wait()
    for _ in range(2):  # the second time after an orderly end
        process = subprocess.Popen(
            [*gateway.process.args],  # type: ignore[misc]  # a list
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            assert process.stderr is not None
            url = next(line.split()[-1] for line in process.stderr if line.startswith("URL"))
            found = httpx.get(f"{url}/admin/routes", headers={"Authorization": key}).json()["routes"]
            assert found["revision"] == "1"
        finally:
            process.terminate()
            process.communicate()


def test_a_first_start_without_room_leaves_no_key_that_nobody_has(disk: Path) -> None:
    database = disk / "gateway.db"
    accounts = Accounts.open(database)
    fill(disk)
    with pytest.raises(EnvironmentFault, match=r"admin\.key: No space left on device"):
        accounts.make_admin_key(disk / "admin.key", "first")
    assert not accounts.keys.admins()
    assert not [path for path in disk.iterdir() if "admin" in path.name]
    (disk / "filling").unlink()
    accounts.make_admin_key(disk / "admin.key", "first")
    assert has_admin_key(disk / "admin.key")
    accounts.close()


def test_an_empty_key_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "admin.key").touch()
    assert not has_admin_key(tmp_path / "admin.key")


def test_what_is_started_has_a_number_of_its_own_without_a_disk(disk: Path) -> None:
    folder = ServiceStore(disk / "service")
    folder.create()
    first = folder.next_number()
    fill(disk)
    found = [first]
    for _ in range(3):
        found.append(folder.next_number())
        time.sleep(0.000_01)  # a process takes longer to start
    (disk / "filling").unlink()
    found.append(folder.next_number())
    assert len(set(found)) == 5


def test_books_open_on_a_full_disk_after_an_orderly_end(disk: Path) -> None:
    Store(disk / "gateway.db").close()
    fill(disk)
    store = Store(disk / "gateway.db")
    assert store.read(lambda connection: connection.execute("SELECT count(*) FROM keys").fetchone()) == (0,)
    store.close(0.1)
