"""Two services of the demo model behind one gateway, by the commands that users type."""

from __future__ import annotations

import json
import os
import signal
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from test_service import plan_file, state, status_of, wait_until

from powerband.cli.main import main
from powerband.fleet.service.store import ServiceStore

__all__ = ["state"]


def ask(folder: ServiceStore, path: str, body: dict[str, Any] | None = None, key: str = "") -> Any:
    data = json.dumps(body).encode() if body is not None else None
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key or 'none'}"}
    request = urllib.request.Request(f"{status_of(folder).gateway.url}{path}", data, headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def complete(folder: ServiceStore, model: str) -> str:
    found = ask(folder, "/v1/completions", {"model": model, "prompt": "Hello", "max_tokens": 4})
    assert found["usage"]["completion_tokens"] == 4
    return str(found["model"])


def test_a_model_is_added_to_a_running_gateway_and_taken_out_again(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_file(tmp_path / "plan.yaml")
    owner, added = ServiceStore(state / "owner"), ServiceStore(state / "added")
    assert main(["deploy", plan, "--name", "owner", "--served-model-name", "first", "--no-verify"]) == 0
    pid = status_of(owner).gateway.pid
    add = ["deploy", plan, "--name", "added", "--served-model-name", "org/second", "--gateway", "owner"]
    assert main([*add, "--verify-seconds", "5"]) == 0
    assert {complete(owner, "first"), complete(added, "org/second")} == {"first", "org/second"}
    assert (status_of(added).gateway.pid, status_of(owner).gateway.pid) == (pid, pid), "the gateway was not restarted"
    assert [model["id"] for model in ask(owner, "/v1/models")["data"]] == ["first", "org/second"]
    assert not added.database.exists(), "there is one key store"
    assert main([*add, "--no-verify"]) == 0, "again, nothing changes"
    capsys.readouterr()
    assert main(["status", "added"]) == 0
    assert "of owner" in capsys.readouterr().out
    assert main(["usage", "added"]) == 0
    assert {"first", "org/second"} <= set(capsys.readouterr().out.split())

    wrong = [
        ["deploy", plan, "--name", "third", "--served-model-name", "first", "--gateway", "owner"],
        ["deploy", plan, "--name", "third", "--served-model-name", "third", "--gateway", "added"],
        ["deploy", plan, "--name", "third", "--gateway", "nobody"],
        ["deploy", plan, "--name", "third", "--gateway", "owner", "--port", "9"],
        ["remove", "owner"],
    ]
    for command in wrong:
        assert main(command) == (3 if "nobody" in command else 2)  # 3: there is no such service
    assert "also serves added" in capsys.readouterr().err

    for kill in (status_of(added).pid, status_of(owner).pid, pid):  # both controllers, and the gateway
        os.kill(kill, signal.SIGKILL)
    assert main(["deploy"]) == 0
    wait_until(lambda: status_of(owner).gateway.pid not in (0, pid) and status_of(owner).phase == "ready")
    wait_until(lambda: status_of(added).gateway.pid == status_of(owner).gateway.pid)
    wait_until(lambda: status_of(added).phase == "ready")
    assert {complete(owner, "first"), complete(added, "org/second")} == {"first", "org/second"}

    assert main(["remove", "added"]) == 0
    assert complete(owner, "first") == "first"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        complete(owner, "org/second")
    assert main(["remove", "owner"]) == 0
