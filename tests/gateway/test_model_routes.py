"""Several models behind one gateway: each with a route of its own, which is set without touching the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import vllm_replica
from byte_replica import ByteReplica
from gateways_for_tests import RunningGateway, running_gateway, until
from pass_through_gateway import new_key

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}
NAMES = ("org/chat model", "embedder")


@pytest.fixture(scope="module")
def replicas() -> Iterator[list[ByteReplica]]:
    with vllm_replica.vllm_replica() as first, vllm_replica.vllm_replica() as second:
        yield [first, second]


@pytest.fixture
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), "--auth=keys") as running:
        yield running


def put(gateway: RunningGateway, name: str, replica: ByteReplica, **more: Any) -> dict[str, Any]:
    one = {"id": f"{name}-1", "url": replica.url, "model": "inner", "engine": "vllm", **more.pop("replica", {})}
    found = gateway.admin.put(f"/admin/routes/{name}", json={"replicas": [one], **more})
    assert found.status_code == 200, found.text
    answer: dict[str, Any] = found.json()
    return answer


def served(gateway: RunningGateway) -> list[str]:
    return [model["name"] for model in gateway.admin.get("/admin/routes").json()["routes"]["models"]]


def test_each_model_is_added_changed_and_removed_alone(gateway: RunningGateway, replicas: list[ByteReplica]) -> None:
    for name, replica in zip(NAMES, replicas, strict=True):
        put(gateway, name, replica, revision="1")
    until(lambda: list(gateway.replica_states().values()) == ["ready", "ready"])
    assert served(gateway) == list(NAMES)
    put(gateway, NAMES[0], replicas[0], revision="2", aliases=["chat"])
    assert set(gateway.replica_states().values()) == {"ready"}, "both go on serving"
    for _ in range(2):  # a controller repeats what it asked for
        assert gateway.admin.delete(f"/admin/routes/{NAMES[0]}").status_code == 200
        assert served(gateway) == [NAMES[1]]


def test_the_same_revision_again_changes_nothing(gateway: RunningGateway, replicas: list[ByteReplica]) -> None:
    put(gateway, "a", replicas[0], revision="1")
    gateway.admin.post("/admin/drain", json={"replica": "a-1"}).raise_for_status()
    answer = put(gateway, "a", replicas[0], revision="1")
    assert answer["routes"]["models"][0]["replicas"][0]["draining"], "an operator's change stays"
    entries = gateway.admin.get("/admin/audit").json()["data"]
    assert sum(entry["action"] == "routes" for entry in entries) == 1
    answer = put(gateway, "a", replicas[0], revision="2")
    assert not answer["routes"]["models"][0]["replicas"][0]["draining"]


def test_models_that_collide_are_refused(gateway: RunningGateway, replicas: list[ByteReplica]) -> None:
    put(gateway, "a", replicas[0], aliases=["b"])
    for name, body in (
        ("b", {"replicas": []}),
        ("c", {"replicas": [{"id": "a-1", "url": replicas[1].url, "model": "inner"}]}),
        ("c", {"name": "d"}),
        ("c", {"replica": []}),
    ):
        found = gateway.admin.put(f"/admin/routes/{name}", json=body)
        assert found.status_code == 400, found.text
    assert served(gateway) == ["a"]
    _, secret = new_key(gateway)
    headers = {"Authorization": f"Bearer {secret}"}
    assert gateway.http.delete("/admin/routes/a", headers=headers).status_code == 403


def test_two_models_have_their_own_usage_metrics_and_limits(
    gateway: RunningGateway, replicas: list[ByteReplica]
) -> None:
    put(gateway, NAMES[0], replicas[0], usd_per_million_output=1e6)
    put(gateway, NAMES[1], replicas[1], usd_per_million_input=1e6)
    until(lambda: list(gateway.replica_states().values()) == ["ready", "ready"])
    key, secret = new_key(gateway)
    _, only_one = new_key(gateway, models=[NAMES[1]])
    headers = {"Authorization": f"Bearer {secret}"}
    chat = {"model": NAMES[0], **CHAT}
    embed = {"model": NAMES[1], "input": "one"}
    assert gateway.post("/v1/chat/completions", chat, headers=headers).json()["model"] == NAMES[0]
    assert gateway.post("/v1/embeddings", embed, headers=headers).json()["model"] == NAMES[1]
    unnamed = gateway.post("/v1/chat/completions", CHAT, headers=headers)
    assert (unnamed.status_code, unnamed.json()["error"]["code"]) == (404, "model_not_found")
    only_headers = {"Authorization": f"Bearer {only_one}"}
    assert gateway.post("/v1/chat/completions", chat, headers=only_headers).status_code == 403
    assert gateway.post("/v1/embeddings", embed, headers=only_headers).status_code == 200
    listed = gateway.http.get("/v1/models", headers=headers).json()["data"]
    assert [model["id"] for model in listed] == list(NAMES)
    rows = gateway.admin.get("/admin/usage", params={"by": "key,model"}).json()["data"]
    of_key = {
        row["model"]: (row["prompt_tokens"], row["output_tokens"], row["cost_usd"]) for row in rows if row["key"] == key
    }
    assert of_key == {NAMES[0]: (7, 9, 9.0), NAMES[1]: (3, 0, 3.0)}
    page = gateway.admin.get("/metrics").text
    for name, endpoint in zip(NAMES, ("chat", "embeddings"), strict=True):
        assert f'model_name="{name}",outcome="ok",status="200"' in page
        assert f'endpoint="{endpoint}",model_name="{name}"' in page


def test_routes_of_models_outlive_a_restart(tmp_path: Any, replicas: list[ByteReplica]) -> None:
    with running_gateway(tmp_path) as gateway:
        for name, replica in zip(NAMES, replicas, strict=True):
            put(gateway, name, replica, revision="7")
    with running_gateway(tmp_path) as gateway:
        assert served(gateway) == list(NAMES)
