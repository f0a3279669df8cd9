"""Responses, Messages, embeddings, scores and reranking of Powerband's own replicas, through a gateway."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from gateways_for_tests import RunningGateway, running_gateway, until
from pass_through_gateway import client_of, last_record, new_key
from test_failover_real import replica

BODIES: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": ["one", "two words"], "dimensions": 8},
    "/v1/score": {"text_1": "weather", "text_2": ["sun", "rain"]},
    "/v1/rerank": {"query": "weather", "documents": ["sun", "rain"]},
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway")
    with (
        replica(folder, "--convert=embed") as (url, _),
        running_gateway(folder, f"--replica={url}", "--store-content", timeout_s=120) as gateway,
    ):
        until(lambda: set(gateway.replica_states().values()) == {"ready"})
        yield gateway
        assert "Traceback" not in (folder / "gateway.log").read_text()


@pytest.mark.parametrize("path", BODIES)
def test_texts_are_pooled_and_counted(gateway: RunningGateway, path: str) -> None:
    answer = gateway.post(path, {"model": "demo", **BODIES[path]})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert len(found.get("data") or found["results"]) == 2
    record = last_record(gateway)
    assert record["record"]["prompt_tokens"] == found["usage"]["total_tokens"] > 0
    assert (record["record"]["output_tokens"], record["is_estimate"]) == (0, False)


def test_responses(gateway: RunningGateway) -> None:
    client = client_of(gateway)
    asked: dict[str, Any] = {"model": "demo", "input": "What is a list?", "max_output_tokens": 20, "temperature": 0}
    whole = client.responses.create(**asked)
    assert whole.usage is not None
    assert last_record(gateway)["record"]["output_tokens"] == whole.usage.output_tokens > 0
    with client.responses.stream(**asked) as stream:
        streamed = stream.get_final_response()
    assert streamed.output_text == whole.output_text != ""
    record = last_record(gateway)
    assert record["record"]["output_tokens"] == whole.usage.output_tokens
    assert (record["request"]["endpoint"], record["is_estimate"]) == ("responses", False)


def test_a_stored_conversation_is_answered_as_if_it_was_sent_whole(gateway: RunningGateway) -> None:
    client = client_of(gateway)
    asked: dict[str, Any] = {"model": "demo", "max_output_tokens": 20, "temperature": 0}
    first = client.responses.create(input="What is a list?", **asked)
    continued = client.responses.create(input="And a tuple?", previous_response_id=first.id, **asked)
    items: Any = [
        {"role": "user", "content": "What is a list?"},
        *first.output,
        {"role": "user", "content": "And a tuple?"},
    ]
    whole = client.responses.create(input=items, store=False, **asked)
    assert continued.output_text == whole.output_text != ""
    assert continued.usage is not None
    counted = client.responses.input_tokens.count(model="demo", input="And a tuple?", previous_response_id=first.id)
    assert counted.input_tokens == continued.usage.input_tokens
    assert last_record(gateway)["record"]["prompt_tokens"] == counted.input_tokens
    assert whole.usage is not None
    assert continued.usage.input_tokens == whole.usage.input_tokens


def test_messages(gateway: RunningGateway) -> None:
    client = anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0)
    asked: Any = {"model": "demo", "messages": [{"role": "user", "content": "What is a list?"}], "max_tokens": 20}
    whole = client.messages.create(**asked)
    assert whole.usage.output_tokens == last_record(gateway)["record"]["output_tokens"]
    with client.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    assert [one.to_dict() for one in streamed.content] == [one.to_dict() for one in whole.content]
    record = last_record(gateway)
    assert record["record"]["output_tokens"] == whole.usage.output_tokens
    assert (record["request"]["endpoint"], record["is_estimate"]) == ("messages", False)


def test_limits_of_tokens_hold_for_texts_that_are_pooled(gateway: RunningGateway) -> None:
    _, secret = new_key(gateway, tokens_per_min=30)
    key = {"Authorization": f"Bearer {secret}"}
    body = {"model": "demo", "input": "word " * 20}
    assert gateway.post("/v1/embeddings", body, headers=key).status_code == 200
    refused = gateway.post("/v1/embeddings", body, headers=key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "tokens_limit")
