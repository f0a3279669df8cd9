"""Answers of replicas that are in no form which a client could read, or that say themselves that they were cut."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from byte_replica import answer
from gateways_for_tests import RunningGateway, running_gateway, text_of
from test_replica_answers import CALM, CHAT, CHUNKED, STOP, TEXT, WHOLE, WORDS, chunk, log, says, serving, stream

from powerband.errors import InvalidRequest
from powerband.gateway.proxy.client_request import ClientRequest
from powerband.gateway.request import Endpoint


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), *CALM) as running:
        yield running
        assert "Traceback" not in log(running)


def test_an_event_of_several_lines_reaches_the_client_as_one(gateway: RunningGateway) -> None:
    events = [json.dumps({**one, "model": "inner"}, indent=1) for one in (*WORDS, STOP)]
    lines = ["".join(f"data: {line}\n" for line in one.split("\n")) for one in events]
    body = "\n".join([*lines, "data: [DONE]\n\n"]).encode()
    with serving(gateway, says(CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))):
        told = gateway.stream("/v1/chat/completions", CHAT)
    assert (text_of(told), told[-1]) == (TEXT, "[DONE]")


@pytest.mark.parametrize("text", [5, ["a"], {"a": 1}, True])
@pytest.mark.parametrize("is_stream", [True, False])
def test_a_text_that_is_none_is_the_replicas_fault(gateway: RunningGateway, text: Any, is_stream: bool) -> None:
    value = {"model": "inner", "choices": [{"index": 0, "text": text, "finish_reason": "stop"}]}
    said = stream([value]) if is_stream else answer(json.dumps(value))
    with serving(gateway, says(said)):
        told = gateway.post("/v1/completions", {"model": "public", "prompt": "a", "stream": is_stream})
    assert (told.status_code, told.json()["error"]["code"]) == (502, "upstream_failed")


@pytest.mark.parametrize("reason", ["abort", "ABORT", "error", "cancelled"])
def test_an_answer_that_its_engine_gave_up_is_not_whole(gateway: RunningGateway, reason: str) -> None:
    with serving(gateway, says(stream([*WORDS, chunk({}, reason)]))):
        assert "error" in gateway.stream("/v1/chat/completions", CHAT)[-1]
    message = {**WHOLE, "choices": [{**WHOLE["choices"][0], "finish_reason": reason}]}
    with serving(gateway, says(answer(json.dumps(message)))):
        assert gateway.post("/v1/chat/completions", CHAT).status_code == 502


def test_an_error_in_a_stream_names_the_model_as_it_is_served(gateway: RunningGateway) -> None:
    own = {"error": {"message": "inner has no such voice", "type": "invalid_request_error", "code": 400}}
    for said in (stream([own]), answer(json.dumps(own))):
        with serving(gateway, says(said)):
            told = gateway.post("/v1/chat/completions", {**CHAT, "stream": said.startswith(CHUNKED)})
        assert told.status_code == 400
        assert "inner" not in told.text


@pytest.mark.parametrize("status", [200, 302, 401, 403, 404, 429])
def test_a_token_look_up_that_a_replica_does_not_answer_is_not_the_clients_fault(
    gateway: RunningGateway, status: int
) -> None:
    page = answer("<html>inner</html>", status=status, kind="text/html")
    right = answer(json.dumps({"count": 1, "tokens": [1]}))
    with serving(gateway, says(page)):
        told = gateway.post("/tokenize", {"prompt": "a", "model": "public"})
    assert (
        (told.status_code, told.json()["error"]["code"]) == (404, "not_found") if status == 404 else (503, "no_replica")
    )
    with serving(gateway, says(page), says(right)):
        assert gateway.post("/tokenize", {"prompt": "a", "model": "public"}).json()["tokens"] == [1]


def test_a_token_look_up_that_is_wrong_is_refused_in_openais_shape(gateway: RunningGateway) -> None:
    with serving(gateway, says(answer(json.dumps({"detail": "inner cannot read it"}), status=422))):
        told = gateway.post("/tokenize", {"prompt": "a", "model": "public"})
    assert told.status_code == 422
    assert set(told.json()["error"]) == {"message", "type", "param", "code"}
    assert "inner" not in told.text


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        ("chat", {"max_tokens": 9, "max_completion_tokens": 1}),
        ("chat", {"max_tokens": 1, "n_predict": 9}),
        ("chat", {"n": 1, "n_cmpl": 9}),
        ("completions", {"max_tokens": 9, "max_completion_tokens": 1}),
        ("completions", {"max_tokens": 1, "n_predict": 9}),
    ],
)
def test_a_request_with_two_limits_of_which_an_engine_may_take_either_is_refused(
    endpoint: Endpoint, fields: dict[str, int]
) -> None:
    """What was reserved would not be what is made, and a replica that made more would be taken for one that lies."""
    body = {"model": "public", "messages": [], "prompt": "a", **fields}
    with pytest.raises(InvalidRequest):
        ClientRequest(json.dumps(body).encode(), endpoint)


ENDED = {"index": 0, "text": "a", "finish_reason": "stop"}


@pytest.mark.parametrize(
    ("engine", "fields", "is_right"),
    [
        ("vllm", {"prompt": "a", "n": 2}, False),
        ("sglang", {"prompt": ["a", "b"]}, False),
        ("openai", {"prompt": ["a", "b"]}, False),
        ("openai", {"prompt": "a", "n": 2}, True),  # it may not know n
    ],
)
@pytest.mark.parametrize("is_stream", [True, False])
def test_an_answer_that_lacks_choices_is_not_whole(
    gateway: RunningGateway, engine: str, fields: dict[str, Any], is_stream: bool, is_right: bool
) -> None:
    value = {"model": "inner", "choices": [ENDED]}
    said = stream([value]) if is_stream else answer(json.dumps(value))
    with serving(gateway, says(said), engine=engine):
        told = gateway.post("/v1/completions", {"model": "public", "stream": is_stream, **fields})
    assert ("error" not in told.text) == is_right


def test_an_error_event_of_an_older_vllm_is_an_error(gateway: RunningGateway) -> None:
    own = {"object": "error", "message": "boom", "type": "InternalServerError", "param": None, "code": 500}
    with serving(gateway, says(stream([*WORDS, own, STOP]))):
        assert "error" in gateway.stream("/v1/chat/completions", CHAT)[-1]
