"""Endpoints of vLLM through a gateway, asked by the official client or as its documentation shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import vllm_replica
from byte_replica import answer
from gateways_for_tests import RunningGateway, gateway_before, running_gateway
from pass_through_gateway import client_of, last_record, new_key, serving

from powerband.engines.powerband import POWERBAND
from powerband.mock_server.behavior import Behavior

CALM = ("--stream-idle-timeout-s=2", "--first-byte-timeout-s=2")
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": ["one", "two"]},
    "/pooling": {"input": "one"},
    "/classify": {"input": "one"},
    "/v1/rerank": {"query": "weather", "documents": ["sun", "rain"]},
    "/rerank": {"query": "weather", "documents": ["sun", "rain"]},
    "/v2/rerank": {"query": "weather", "documents": ["sun", "rain"]},
    "/v1/score": {"text_1": "weather", "text_2": ["sun", "rain"]},
    "/score": {"text_1": "weather", "text_2": ["sun", "rain"]},
    "/v1/responses": {"input": "How is the weather?", "max_output_tokens": 20},
    "/v1/messages": {"messages": [{"role": "user", "content": "How is the weather?"}], "max_tokens": 20},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "How is the weather?"}]},
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), *CALM) as running:
        yield running
        assert "Traceback" not in (running.database.parent / "gateway.log").read_text()


# ---- responses that are not streamed


@pytest.mark.parametrize("path", BODIES)
def test_a_response_comes_as_the_replica_sent_it_under_the_served_name(gateway: RunningGateway, path: str) -> None:
    with serving(gateway) as (replica,):
        found = gateway.post(path, {"model": "public", **BODIES[path], "unknown": {"a": [1]}})
        assert found.status_code == 200, found.text
        sent = replica.posts[-1]
        assert (sent["model"], sent["unknown"], replica.post_paths) == ("inner", {"a": [1]}, [path])
        expected = vllm_replica.WHOLE[path]({**sent, "model": "public"})
        assert found.json() == expected


def test_embeddings_of_the_official_client(gateway: RunningGateway) -> None:
    """It asks for base64, and decodes it."""
    with serving(gateway):
        found = client_of(gateway).embeddings.create(model="public", input=["one", "two"])
        assert [one.embedding for one in found.data] == [list(vllm_replica.VECTOR)] * 2
        assert (found.model, found.usage.prompt_tokens) == ("public", 6)


def test_responses_of_the_official_client(gateway: RunningGateway) -> None:
    with serving(gateway):
        client = client_of(gateway)
        found = client.responses.create(model="public", input="How is the weather?")
        assert (found.output_text, found.model, found.status) == (vllm_replica.TEXT, "public", "completed")
        called = client.responses.create(model="public", input="How is the weather?", tools=[TOOL])  # type: ignore[list-item]
        assert [one.type for one in called.output] == ["reasoning", "function_call"]


@pytest.mark.parametrize(
    ("path", "tokens"),
    [
        ("/v1/embeddings", (6, 0, 0)),
        ("/v1/rerank", (20, 0, 0)),
        ("/score", (8, 0, 0)),
        ("/classify", (5, 0, 0)),
        ("/v1/responses", (7, 2, 4)),
        ("/v1/messages", (7, 0, 4)),
    ],
)
def test_usage_and_cost_are_what_the_replica_counted(
    gateway: RunningGateway, path: str, tokens: tuple[int, int, int]
) -> None:
    key, secret = new_key(gateway)
    with serving(gateway):
        sent = {"model": "public", **BODIES[path]}
        assert gateway.post(path, sent, headers={"Authorization": f"Bearer {secret}"}).status_code == 200
        record = last_record(gateway)
        counted = record["record"]
        assert (counted["prompt_tokens"], counted["cached_tokens"], counted["output_tokens"]) == tokens
        assert (record["cost_usd"], record["is_estimate"]) == (tokens[0] + 2.0 * tokens[2], False)
        name = path.rpartition("/")[2]
        assert (record["request"]["endpoint"], record["request"]["tenant"]) == (name, key)
        rows = gateway.admin.get("/admin/usage", params={"by": "key,model"}).json()["data"]
        assert [(one["model"], one["prompt_tokens"]) for one in rows if one["key"] == key] == [("public", tokens[0])]
        assert f'endpoint="{name}"' in gateway.admin.get("/metrics").text


def test_requests_of_a_key_are_limited_and_kept_apart(gateway: RunningGateway) -> None:
    key, secret = new_key(gateway, requests_per_min=2, tokens_per_min=100)
    headers = {"Authorization": f"Bearer {secret}"}
    with serving(gateway) as (replica,):
        body = {"model": "public", "input": "one two three"}
        first = gateway.post("/v1/embeddings", {**body, "cache_salt": "mine", "priority": 3}, headers=headers)
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert (replica.posts[-1]["cache_salt"], "priority" in replica.posts[-1]) == (f"{key}/mine", False)
        large = gateway.post("/v1/embeddings", {**body, "input": "word " * 1000}, headers=headers)
        assert (large.status_code, large.json()["error"]["code"]) == (400, "tokens_limit")
        assert gateway.post("/pooling", body, headers=headers).status_code == 200
        refused = gateway.post("/pooling", body, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "requests_limit")
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"


def test_each_document_is_counted_with_the_query(gateway: RunningGateway) -> None:
    _, secret = new_key(gateway, usd=1000.0)  # 1 USD for a token here, and at most one token for each byte
    headers = {"Authorization": f"Bearer {secret}"}
    with serving(gateway):
        body = {"model": "public", "query": "q" * 60, "documents": ["a", "b"]}
        assert gateway.post("/rerank", body, headers=headers).status_code == 200
        found = gateway.post("/rerank", {**body, "documents": ["a"] * 20}, headers=headers)
        assert found.json()["error"]["code"] == "spend_limit"


def test_a_response_without_a_limit_is_capped_to_what_the_key_may_use(gateway: RunningGateway) -> None:
    _, secret = new_key(gateway, tokens_per_min=1000)
    with serving(gateway) as (replica,):
        client_of(gateway, secret).responses.create(model="public", input="hi")
        assert 0 < replica.posts[-1]["max_output_tokens"] <= 1000


# ---- replicas that lack an endpoint


def test_an_engine_without_the_endpoint_is_named_and_stays_in_routing(tmp_path: Path) -> None:
    with gateway_before(tmp_path, Behavior(model="demo")) as gateway:
        lacking = {path: body for path, body in BODIES.items() if not POWERBAND.may_offer(path)}
        assert "/classify" in lacking
        for path, body in lacking.items():
            found = gateway.post(path, {"model": "demo", **body})
            assert found.status_code == 404
            assert found.json()["error"]["message"].startswith(f"The model's engine, Powerband, has no {path}.")
        assert set(gateway.replica_states().values()) == {"ready"}


@pytest.mark.parametrize("status", [404, 405, 501])
def test_what_one_replica_lacks_another_may_have(gateway: RunningGateway, status: int) -> None:
    def lacks(_path: str, _body: dict[str, Any]) -> bytes:
        return answer('{"detail":"Not Found"}', status=status)

    body = {"model": "public", **BODIES["/v1/embeddings"]}
    with serving(gateway, lacks, vllm_replica.respond):
        assert {gateway.post("/v1/embeddings", body).status_code for _ in range(6)} == {200}
    with serving(gateway, lacks, lacks):
        for _ in range(6):
            found = gateway.post("/v1/embeddings", body)
            assert (found.status_code, found.json()["error"]["code"]) == (404, "not_found")
            assert "The model's engine, vLLM, has no /v1/embeddings." in found.json()["error"]["message"]
        assert set(gateway.replica_states().values()) == {"ready"}


def test_replicas_of_powerband_are_not_asked(gateway: RunningGateway) -> None:
    with serving(gateway, engine="openai") as (replica,):
        url = replica.url
        one = {"id": "own", "url": url, "model": "inner", "engine": "powerband"}
        gateway.admin.put("/admin/routes", json={"models": [{"name": "public", "replicas": [one]}]})
        found = gateway.post("/classify", {"model": "public", "input": "a"})
        assert found.status_code == 404
        assert "engine, Powerband, has no /classify" in found.json()["error"]["message"]
        assert replica.posts == []


# ---- errors of requests


def test_errors_of_requests_are_the_replicas_own(gateway: RunningGateway) -> None:
    def refuses(_path: str, _body: dict[str, Any]) -> bytes:
        error = {"message": "The model inner wants less", "type": "BadRequestError", "param": None, "code": 400}
        return answer(json.dumps({"error": error}), status=400)

    with serving(gateway, refuses, refuses) as replicas:
        with pytest.raises(openai.BadRequestError, match="The model public wants less"):
            client_of(gateway).embeddings.create(model="public", input="a")
        assert sum(len(one.posts) for one in replicas) == 1


@pytest.mark.parametrize(
    ("path", "more", "param"),
    [
        ("/v1/responses", {"previous_response_id": "resp_of_another_key"}, "previous_response_id"),
        ("/v1/responses", {"conversation": {"id": "conv_1"}}, "conversation"),
        ("/v1/responses", {"background": True}, "background"),
        ("/v1/responses", {"max_tokens": 10}, "max_tokens"),
        ("/v1/responses", {"n": 2}, "n"),
        ("/v1/responses", {"Max_Output_Tokens": 2}, "Max_Output_Tokens"),
        ("/v1/messages", {"max_tokens": None}, "max_tokens"),
        ("/v1/messages", {"n_predict": 100}, "n_predict"),
        ("/v1/embeddings", {"encoding_format": "bytes"}, "encoding_format"),
        ("/v1/embeddings", {"input": None}, "input"),
        ("/v1/embeddings", {"messages": []}, "messages"),
        ("/rerank", {"documents": None}, "documents"),
    ],
)
def test_what_cannot_be_limited_or_kept_apart_is_refused(
    gateway: RunningGateway, path: str, more: dict[str, Any], param: str
) -> None:
    with serving(gateway) as (replica,):
        found = gateway.post(path, {"model": "public", **BODIES[path], **more})
        assert found.status_code == 400, found.text
        assert f"'{param}'" in found.json()["error"]["message"]
        assert replica.posts == []


def test_fields_that_ask_for_nothing_are_passed_on(gateway: RunningGateway) -> None:
    more = {"previous_response_id": None, "background": False, "conversation": None, "n": 1, "store": True}
    with serving(gateway) as (replica,):
        assert gateway.post("/v1/responses", {"model": "public", "input": "a", **more}).json()["store"] is False
        assert replica.posts[-1]["store"] is False, "nobody could read what is stored"


# ---- Anthropic's clients


def test_anthropics_clients_bring_their_key_in_a_header_of_its_own(tmp_path: Path) -> None:
    body = {"model": "public", **BODIES["/v1/messages"]}
    with running_gateway(tmp_path, "--auth=keys") as gateway, serving(gateway):
        _, secret = new_key(gateway)
        for path in ("/v1/messages", "/v1/messages?beta=true", "/v1/messages/count_tokens"):
            assert gateway.post(path, body, headers={"x-api-key": secret}).status_code == 200
        refused = gateway.post("/v1/messages", body, headers={"x-api-key": "pb-wrong"})
        assert (refused.status_code, refused.json()["type"]) == (401, "error")
        assert refused.json()["error"]["type"] == "authentication_error"
        missing = gateway.post("/v1/messages", body)
        assert missing.json()["error"]["code"] == "missing_api_key"
        assert gateway.post("/v1/embeddings", body, headers={"x-api-key": secret}).status_code == 401


def test_errors_of_messages_are_in_anthropics_format(gateway: RunningGateway) -> None:
    body = {"model": "public", **BODIES["/v1/messages"]}
    _, secret = new_key(gateway, requests_per_min=1)
    with serving(gateway):
        headers = {"x-api-key": secret}
        found = [
            gateway.post("/v1/messages", {**body, "model": "other"}),
            gateway.post("/v1/messages", {**body, "messages": None}),
            gateway.post("/v1/messages", body, headers=headers),
            gateway.post("/v1/messages", body, headers=headers),
        ]
        assert [one.status_code for one in found] == [404, 400, 200, 429]
        assert found[0].json()["error"]["type"] == "not_found_error"
        assert found[1].json()["error"]["type"] == "invalid_request_error"
        assert found[3].json()["error"]["type"] == "rate_limit_error"
        assert found[3].headers["retry-after"]


# ---- replicas that fail


def test_a_replica_that_fails_is_replaced_and_one_that_lies_is_ejected(gateway: RunningGateway) -> None:
    lies = {
        "a page": answer("<html>login</html>", kind="text/html"),
        "no data": answer('{"object": "list"}'),
        "a number": answer("7}"),
        "usage below 0": answer('{"data": [], "usage": {"prompt_tokens": -1}}'),
        "no UTF-8": answer(b'{"data": ["\xff"]}'),
        "cut off": answer("{}")[:-1],
        "an error": answer('{"error": {"message": "out of memory", "code": 500}}'),
        "status 500": answer('{"error": "boom"}', status=500),
    }
    for name, lie in lies.items():
        with serving(gateway, lambda _path, _body, lie=lie: lie, vllm_replica.respond, name=name):  # type: ignore[misc]
            found = [gateway.post("/v1/embeddings", {"model": name, **BODIES["/v1/embeddings"]}) for _ in range(8)]
            assert [one.status_code for one in found] == [200] * 8, name
            assert sorted(gateway.replica_states().values()) == ["open", "ready"], name


def test_usage_that_cannot_be_is_not_charged(gateway: RunningGateway) -> None:
    def lies(_path: str, body: dict[str, Any]) -> bytes:
        usage = {"prompt_tokens": 2**39, "total_tokens": 2**39}
        return answer(json.dumps({**vllm_replica.embeddings(body), "usage": usage}))

    with serving(gateway, lies):
        assert gateway.post("/v1/embeddings", {"model": "public", "input": "a"}).status_code == 200
        record = last_record(gateway)
        assert record["is_estimate"]
        assert record["record"]["prompt_tokens"] < 1 << 17


def test_a_large_response_is_passed_on_whole(gateway: RunningGateway) -> None:
    vector = [0.123456789] * 1024

    def large(_path: str, body: dict[str, Any]) -> bytes:
        data = [{"object": "embedding", "index": place, "embedding": vector} for place in range(300)]
        return answer(json.dumps({**vllm_replica.embeddings(body), "data": data}))

    with serving(gateway, large):
        found = gateway.post("/v1/embeddings", {"model": "public", "input": ["a"] * 300})
        assert found.json()["model"] == "public"
        assert len(found.content) > 3 << 20
        assert found.json()["data"][299]["embedding"] == vector
        assert last_record(gateway)["record"]["prompt_tokens"] == 900


def test_a_list_of_results_is_passed_on_as_sglang_sends_it(gateway: RunningGateway) -> None:
    results = [{"score": 0.9, "document": "sun", "index": 0}]
    with serving(gateway, lambda _path, _body: answer(json.dumps({"a": 1})[:0] + json.dumps(results))):
        found = gateway.post("/v1/rerank", {"model": "public", **BODIES["/v1/rerank"]})
        assert found.json() == results
        assert last_record(gateway)["is_estimate"]
