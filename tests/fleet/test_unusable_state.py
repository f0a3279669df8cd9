"""State that another user owns, or that is no file: commands say so in one line, and wait for nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from fleet_for_tests import release

from powerband.cli.main import main
from powerband.errors import EnvironmentFault
from powerband.fleet.service.spec import GatewaySpec, ServiceSpec
from powerband.fleet.service.store import ServiceStore

COMMANDS = [["status", "demo"], ["scale", "demo", "0=1"], ["remove", "demo"]]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServiceStore:
    monkeypatch.setenv("POWERBAND_STATE", str(tmp_path))
    store = ServiceStore.named("demo")
    store.create()
    gateway = GatewaySpec(host="127.0.0.1", port=1)
    store.write_spec(ServiceSpec(name="demo", generation=1, release=release(1), gateway=gateway))
    store.controller_lock.touch()
    return store


def forbid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if `path` and what is in it were another user's; tests may run as root, to whom nothing is forbidden."""
    for name in ("open", "stat"):
        real = getattr(os, name)

        def refuse(file: object, *args: object, _real: object = real, **options: object) -> object:
            if isinstance(file, str | os.PathLike) and Path(os.fspath(file)).is_relative_to(path):  # type: ignore[arg-type] # never bytes
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
            return _real(file, *args, **options)  # type: ignore[operator] # of os

        monkeypatch.setattr(os, name, refuse)


@pytest.mark.parametrize(
    ("name", "command"),
    [*(("desired.json", command) for command in COMMANDS), ("controller.lock", ["remove", "demo"])],
)
def test_another_users_state_is_an_error_that_names_the_file(
    store: ServiceStore, name: str, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    forbid(store.path / name, monkeypatch)
    assert main(command) == 3
    error = capsys.readouterr().err
    assert f"Cannot use {store.path / name}: Permission denied." in error
    assert "POWERBAND_STATE" in error


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_fifo_in_place_of_a_file_is_refused_and_not_waited_for(
    store: ServiceStore, command: list[str], capsys: pytest.CaptureFixture
) -> None:
    (store.path / "desired.json").unlink()
    os.mkfifo(store.path / "desired.json")
    assert main(command) == 3
    assert "it is not a regular file" in capsys.readouterr().err


def test_a_folder_that_this_user_may_not_look_into_is_said_before_anything_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POWERBAND_STATE", str(tmp_path / "state"))
    forbid(tmp_path, monkeypatch)
    with pytest.raises(EnvironmentFault, match=r"Cannot keep state in .*: Permission denied"):
        ServiceStore.named("demo").check_can_be_kept()
