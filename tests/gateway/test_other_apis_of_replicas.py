"""OpenAI's Responses and Anthropic's Messages at our replicas, through a gateway: usage, limits, errors, failover."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from gateways_for_tests import RunningGateway, running_gateway, until

from server.servers_for_tests import RunningServer, running_server

HI = "hi there"
ANSWER = "user\nhi there"  # the model repeats its prompt
RESPONSES: dict[str, Any] = {"model": "demo", "input": HI}
MESSAGES: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": HI}], "max_tokens": 50}
BODIES = {"/v1/responses": RESPONSES, "/v1/messages": MESSAGES}


@contextlib.contextmanager
def gateway_before(folder: Path, *models: str) -> Iterator[tuple[RunningGateway, list[RunningServer]]]:
    """A gateway and a replica for each model of the fake engine, all served as 'demo'."""
    with contextlib.ExitStack() as stack:
        replicas = [stack.enter_context(running_server(f"model={model}", "served_model_name=demo")) for model in models]
        gateway = stack.enter_context(running_gateway(folder, *(f"--replica={one.url}" for one in replicas)))
        until(lambda: list(gateway.replica_states().values()) == ["ready"] * len(replicas))
        yield gateway, replicas


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with gateway_before(tmp_path_factory.mktemp("gateway"), "parrot") as (running, _):
        yield running


def events_of(gateway: RunningGateway, path: str) -> list[dict[str, Any]]:
    with gateway.http.stream("POST", path, json={**BODIES[path], "stream": True}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    return [msgspec.json.decode(line) for line in lines]


def reported(usage: dict[str, Any]) -> tuple[int, int]:
    return usage["input_tokens"] + usage.get("cache_read_input_tokens", 0), usage["output_tokens"]


@pytest.mark.parametrize("path", BODIES)
def test_usage_is_the_replicas(gateway: RunningGateway, path: str) -> None:
    whole = gateway.post(path, BODIES[path]).json()["usage"]
    events = events_of(gateway, path)
    for usage in (whole, events[-1]["response"]["usage"] if "response" in events[-1] else events[-2]["usage"]):
        assert reported(usage) == reported(whole)
    for found in gateway.records()[-2:]:
        counted = found["record"]
        assert (counted["prompt_tokens"], counted["output_tokens"]) == reported(whole)
        assert found["request"]["endpoint"] == path.removeprefix("/v1/")
        assert not found["is_estimate"]


def test_the_official_clients_work_through_a_gateway(gateway: RunningGateway) -> None:
    import anthropic  # two seconds of every process that collects tests, if it stood above

    secret = gateway.admin.post("/admin/keys", json={"name": "user"}).json()["secret"]
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=secret, max_retries=0) as client:
        assert client.responses.create(**RESPONSES).output_text == ANSWER
        with client.responses.stream(**RESPONSES) as stream:
            assert stream.get_final_response().output_text == ANSWER
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(**RESPONSES, top_logprobs=2)
        assert refused.value.param == "top_logprobs"
    with anthropic.Anthropic(base_url=gateway.url, api_key=secret, max_retries=0) as other:
        assert other.messages.create(**MESSAGES).content[0].text == ANSWER
        with other.messages.stream(**MESSAGES) as answers:
            assert answers.get_final_message().content[0].text == ANSWER
        counted = other.messages.count_tokens(model="demo", messages=MESSAGES["messages"])
        assert counted.input_tokens == reported(gateway.post("/v1/messages", MESSAGES).json()["usage"])[0]
        with pytest.raises(anthropic.BadRequestError, match=r"messages\.0\.role"):
            other.messages.create(model="demo", max_tokens=5, messages=[{"role": "robot", "content": HI}])


def test_an_answer_without_a_limit_is_cut_to_what_the_key_has_left(gateway: RunningGateway) -> None:
    made = gateway.admin.post("/admin/keys", json={"name": "small", "limits": {"tokens_per_min": 600}})
    headers = {"Authorization": f"Bearer {made.json()['secret']}"}
    answer = gateway.post("/v1/responses", {**RESPONSES, "ignore_eos": True}, headers=headers).json()
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["usage"]["total_tokens"] <= 600
    assert gateway.post("/v1/responses", {**RESPONSES, "max_output_tokens": 500}, headers=headers).status_code == 429


def test_another_replica_answers_when_one_dies_before_the_first_output(tmp_path: Path) -> None:
    with gateway_before(tmp_path, "hanging", "parrot") as (gateway, replicas), ThreadPoolExecutor(4) as threads:

        def waiting() -> list[int]:
            [pool] = gateway.admin.get("/admin/routes").json()["pools"]
            return [replica["inflight"] for replica in pool["replicas"]]

        # However they are spread, some wait at the replica whose steps take a minute.
        asked = [threads.submit(events_of, gateway, path) for path in (*BODIES, *BODIES)]
        until(lambda: sum(waiting()) > 0 and waiting()[1] == 0)
        os.kill(replicas[0].engine_pid(), signal.SIGKILL)
        os.killpg(replicas[0].process.pid, signal.SIGKILL)
        for one in asked:
            events = one.result(60)
            assert events[-1]["type"] in ("response.completed", "message_stop")
            assert [event["type"] for event in events].count(events[0]["type"]) == 1
        assert any(len(record["replicas"]) > 1 for record in gateway.records())
