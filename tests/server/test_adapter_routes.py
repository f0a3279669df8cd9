"""Adapters over HTTP: listed, chosen by `model`, loaded and unloaded while others are served."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from servers_for_tests import RunningServer, running_server

PATHS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def server(running: RunningServer) -> RunningServer:
    """The one server, without adapters."""
    for name in [name for name, parent in listed(running).items() if parent is not None]:
        running.post("/v1/unload_lora_adapter", lora_name=name)
    return running


def load(server: RunningServer, name: str, path: str = "/adapters/a", **more: Any) -> Any:
    return server.post("/v1/load_lora_adapter", lora_name=name, lora_path=path, **more)


def listed(server: RunningServer) -> dict[str, str | None]:
    """The names in /v1/models and their parents."""
    return {card["id"]: card["parent"] for card in server.http.get("/v1/models").json()["data"]}


def test_an_adapter_is_listed_and_chosen_by_its_name(server: RunningServer) -> None:
    [base] = listed(server)
    loaded = load(server, "sql")
    assert loaded.status_code == 200
    assert (loaded.json()["id"], loaded.json()["parent"]) == ("sql", base)
    assert listed(server) == {base: None, "sql": base}
    assert server.http.get("/v1/models/sql").json()["parent"] == base
    answer = server.post("/v1/completions", model="sql", prompt="a b c", max_tokens=3)
    assert answer.json()["model"] == "sql"
    chat = server.post("/v1/chat/completions", model="sql", messages=[{"role": "user", "content": "a"}], max_tokens=3)
    assert chat.json()["model"] == "sql"
    assert server.post("/tokenize", model="sql", prompt="a").status_code == 200


def test_an_unloaded_adapter_is_not_served_and_may_be_loaded_again(server: RunningServer) -> None:
    load(server, "sql")
    gone = server.post("/v1/unload_lora_adapter", lora_name="sql")
    assert gone.json() == {"id": "sql", "object": "model", "deleted": True}
    assert "sql" not in listed(server)
    refused = server.post("/v1/completions", model="sql", prompt="a")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    assert load(server, "sql").status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"lora_name": "x", "lora_path": "bad"}, 400, "bad_adapter", "lora"),
        ({"lora_name": "x", "lora_path": "missing"}, 400, "adapter_not_found", "lora_path"),
        ({"lora_name": "there", "lora_path": "/a"}, 400, "adapter_exists", "lora_name"),
        ({"lora_name": "", "lora_path": "/a"}, 400, None, "lora_name"),
        ({"lora_path": "/a"}, 400, None, "lora_name"),
        ({"lora_name": "x", "lora_path": "/a", "rank": 3}, 400, None, "rank"),
    ],
)
def test_what_cannot_be_loaded_is_refused(
    server: RunningServer, body: dict[str, Any], status: int, code: str | None, param: str
) -> None:
    load(server, "there")
    answer = server.post("/v1/load_lora_adapter", **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert code is None or error["code"] == code
    assert "x" not in listed(server)


def test_the_models_own_name_is_refused(server: RunningServer) -> None:
    [base] = listed(server)
    assert load(server, base).json()["error"]["param"] == "lora_name"


def test_an_unknown_adapter_cannot_be_unloaded(server: RunningServer) -> None:
    answer = server.post("/v1/unload_lora_adapter", lora_name="nothing")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_not_found")


@pytest.mark.parametrize("path", PATHS)
def test_web_pages_may_not_administer(server: RunningServer, path: str) -> None:
    body = {"lora_name": "x", "lora_path": "/a"}
    answer = server.http.post(path, json=body, headers={"Origin": server.url})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed")


def test_others_are_answered_while_an_adapter_is_read(server: RunningServer, tmp_path: Path) -> None:
    file = tmp_path / "file"
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(load, server, "sql", f"until:{file}")
        try:
            for _ in range(3):
                assert server.post("/v1/completions", prompt="a b c", max_tokens=3).status_code == 200
            assert not loading.done()
        finally:
            file.touch()
        assert loading.result().status_code == 200


def test_an_engine_that_died_has_its_adapters_again(server: RunningServer) -> None:
    load(server, "sql")
    os.kill(server.engine_pid(), signal.SIGKILL)
    server.until(lambda: server.http.get("/readyz").status_code == 503)
    server.until(lambda: server.http.get("/readyz").status_code == 200)
    server.until(lambda: "sql" in listed(server))
    assert server.post("/v1/completions", model="sql", prompt="a", max_tokens=2).status_code == 200
