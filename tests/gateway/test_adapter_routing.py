"""LoRA adapters that replicas list: served by their names, at the replicas that have them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from gateways_for_tests import RunningGateway, running_gateway, until
from pass_through_gateway import last_record

from server.servers_for_tests import RunningServer, running_server

TEXT = {"prompt": "a b c", "max_tokens": 3}


@pytest.fixture(scope="module")
def replicas() -> Iterator[list[RunningServer]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(running_server("served_model_name=base")) for _ in range(2)]


@pytest.fixture(scope="module")
def gateway(replicas: list[RunningServer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway")
    with running_gateway(folder, *(f"--replica={one.url}" for one in replicas)) as running:
        until(lambda: list(running.replica_states().values()) == ["ready"] * 2)
        yield running
        assert "Traceback" not in (folder / "gateway.log").read_text()


def load(replica: RunningServer, name: str) -> None:
    replica.post("/v1/load_lora_adapter", lora_name=name, lora_path="/adapters/a").raise_for_status()


def listed(gateway: RunningGateway) -> dict[str, Any]:
    return {card["id"]: card.get("parent") for card in gateway.http.get("/v1/models").json()["data"]}


def test_an_adapter_is_served_by_the_replica_that_has_it(
    gateway: RunningGateway, replicas: list[RunningServer]
) -> None:
    assert gateway.post("/v1/completions", {"model": "sql", **TEXT}).status_code == 404
    load(replicas[1], "sql")
    until(lambda: "sql" in listed(gateway))
    assert listed(gateway) == {"base": None, "sql": "base"}
    for path, body in (
        ("/v1/completions", TEXT),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 3}),
    ):
        for _ in range(3):
            answer = gateway.post(path, {"model": "sql", **body})
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == "sql"
            record = last_record(gateway)
            assert record["request"]["model"] == "sql"
            assert record["replicas"] == [replicas[1].url.partition("://")[2]]
    events = gateway.stream("/v1/completions", {"model": "sql", **TEXT})
    assert {event["model"] for event in events[:-1]} == {"sql"}
    used = {gateway.post("/v1/completions", {"model": "base", **TEXT}).json()["model"] for _ in range(4)}
    assert used == {"base"}

    replicas[1].post("/v1/unload_lora_adapter", lora_name="sql").raise_for_status()
    until(lambda: "sql" not in listed(gateway))
    answer = gateway.post("/v1/completions", {"model": "sql", **TEXT})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_an_adapter_that_was_just_unloaded_is_a_404(gateway: RunningGateway, replicas: list[RunningServer]) -> None:
    load(replicas[0], "gone")
    until(lambda: "gone" in listed(gateway))
    replicas[0].post("/v1/unload_lora_adapter", lora_name="gone").raise_for_status()
    answer = gateway.post("/v1/completions", {"model": "gone", **TEXT})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert gateway.post("/v1/completions", {"model": "base", **TEXT}).status_code == 200
