"""LoRA adapters that replicas list: served by their names, at the replicas that have them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from byte_replica import answer, byte_replica
from gateways_for_tests import RunningGateway, running_gateway, until
from pass_through_gateway import last_record

from powerband.gateway.routes import AdapterRoute, ModelRoute, Routes
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


# ---- through the gateway


def through(gateway: RunningGateway, path: str, **body: Any) -> Any:
    answer = gateway.admin.post(path, json=body)
    answer.raise_for_status()
    return answer.json()


def adapters_of(replica: RunningServer) -> set[str]:
    return {card["id"] for card in replica.http.get("/v1/models").json()["data"]} - {"base"}


def test_an_adapter_is_loaded_and_unloaded_at_every_replica(
    gateway: RunningGateway, replicas: list[RunningServer]
) -> None:
    loaded = through(gateway, "/v1/load_lora_adapter", lora_name="law", lora_path="/adapters/a")
    assert (loaded["id"], loaded["parent"], loaded["replicas"]) == ("law", "base", 2)
    assert [adapters_of(one) for one in replicas] == [{"law"}, {"law"}]
    assert listed(gateway)["law"] == "base"
    assert gateway.post("/v1/completions", {"model": "law", **TEXT}).json()["model"] == "law"
    assert last_record(gateway)["request"]["model"] == "law"
    assert through(gateway, "/v1/unload_lora_adapter", lora_name="law")["deleted"]
    assert [adapters_of(one) for one in replicas] == [set(), set()]
    assert gateway.post("/v1/completions", {"model": "law", **TEXT}).status_code == 404
    actions = [entry["action"] for entry in gateway.admin.get("/admin/audit").json()["data"]]
    assert {"adapters.load", "adapters.unload"} <= set(actions)


def test_a_replica_that_lacks_an_adapter_gets_it(gateway: RunningGateway, replicas: list[RunningServer]) -> None:
    through(gateway, "/v1/load_lora_adapter", lora_name="late", lora_path="/adapters/a")
    replicas[0].post("/v1/unload_lora_adapter", lora_name="late").raise_for_status()  # as one that has just started
    until(lambda: adapters_of(replicas[0]) == {"late"})
    through(gateway, "/v1/unload_lora_adapter", lora_name="late")


def test_what_one_replica_refuses_no_replica_keeps(gateway: RunningGateway, replicas: list[RunningServer]) -> None:
    load(replicas[1], "taken")
    answer = gateway.admin.post("/v1/load_lora_adapter", json={"lora_name": "taken", "lora_path": "/adapters/a"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "adapter_exists")
    assert replicas[1].url.partition("://")[2] in error["message"]
    assert [adapters_of(one) for one in replicas] == [set(), {"taken"}]
    through(gateway, "/v1/load_lora_adapter", lora_name="taken", lora_path="/adapters/a", load_inplace=True)
    assert [adapters_of(one) for one in replicas] == [{"taken"}, {"taken"}]
    through(gateway, "/v1/unload_lora_adapter", lora_name="taken")


@pytest.mark.parametrize(
    ("reported", "status", "code"),
    [
        *((refused, 400, "why") for refused in (400, 404, 409)),
        *((failed, 503, "no_replica") for failed in (401, 429, 500, 503)),
    ],
)
def test_only_what_a_replica_refuses_is_the_administrators_fault(
    tmp_path: Path, reported: int, status: int, code: str
) -> None:
    """Others may load it later: a replica that starts, is overloaded, or does not know the gateway's key."""

    async def play(writer: asyncio.StreamWriter, _: dict[str, Any]) -> None:
        writer.write(answer('{"error": {"message": "because", "code": "why"}}', status=reported))

    paths = ("/v1/models", "/health")
    with (
        byte_replica(play, owner="vllm", paths=paths) as replica,
        running_gateway(tmp_path, f"--replica={replica.url}") as gateway,
    ):
        until(lambda: list(gateway.replica_states().values()) == ["ready"])
        found = gateway.admin.post("/v1/load_lora_adapter", json={"lora_name": "sql", "lora_path": "/adapters/a"})
        error = found.json()["error"]
        assert (found.status_code, error["code"]) == (status, code)
        assert "because" in error["message"]
        assert gateway.admin.get("/admin/routes").json()["routes"].get("adapters", []) == []


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("load", {"lora_name": "base", "lora_path": "/adapters/a"}, 400, "lora_name"),
        ("load", {"lora_name": "", "lora_path": "/adapters/a"}, 400, "lora_name"),
        ("load", {"lora_name": "a", "lora_path": "/adapters/a", "model": "gpt-9"}, 404, "model"),
        ("load", {"lora_name": "a"}, 400, "lora_path"),
        ("load", {"lora_name": "a", "lora_path": "/adapters/a", "rank": 8}, 400, "rank"),
        ("unload", {"lora_name": "never"}, 404, "lora_name"),
    ],
)
def test_a_wrong_request_is_named(
    gateway: RunningGateway, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    answer = gateway.admin.post(f"/v1/{path}_lora_adapter", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


def test_only_administrators_load_adapters(gateway: RunningGateway) -> None:
    body = {"lora_name": "a", "lora_path": "/adapters/a"}
    assert gateway.post("/v1/load_lora_adapter", body).status_code == 401


def test_adapters_stay_when_the_route_of_their_model_is_replaced_and_go_with_it() -> None:
    routes = Routes(models=(ModelRoute(name="base"), ModelRoute(name="other")))
    adapter = AdapterRoute(name="sql", path="/adapters/a", model="base")
    assert "adapters" not in routes.as_dict()  # which a gateway of the version before would refuse
    routes = routes.with_adapter(adapter).with_model(ModelRoute(name="base", revision="2"))
    assert Routes.from_dict(routes.as_dict()).adapters == (adapter,)
    assert routes.without_model("other").adapters == (adapter,)
    assert routes.without_model("base").adapters == ()
