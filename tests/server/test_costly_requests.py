"""Requests that ask for much: others are answered meanwhile, and what no answer could hold is refused at once."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from servers_for_tests import RunningServer, running_server

from powerband.engine.process import SocketInbox
from powerband.server.generation.engine_requests import MAX_OUTPUT_LOGPROBS, MAX_PROMPT_LOGPROBS

PATH = "/v1/completions"
CONTEXT = 512  # of the fake engine


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server() as running:
        yield running


def answers_of_others(server: RunningServer, body: dict[str, Any]) -> tuple[httpx.Response, int]:
    """The answer to a request, and how often another client was answered meanwhile."""
    found: list[httpx.Response] = []
    sender = threading.Thread(target=lambda: found.append(httpx.post(f"{server.url}{PATH}", json=body, timeout=120)))
    sender.start()
    count = 0
    while sender.is_alive():
        assert server.http.get("/livez").status_code == 200
        count += 1
    sender.join()
    return found[0], count


COSTLY: dict[str, dict[str, Any]] = {
    "a thousand choices of 65,536 allowed tokens": {
        "prompt": ["a"] * 64,
        "n": 16,
        "max_tokens": 4,
        "allowed_token_ids": [i % 4096 for i in range(65_536)],
    },
    "log-probabilities of long prompts": {
        "prompt": [[5] * (CONTEXT - 2)] * 64,
        "max_tokens": 1,
        "echo": True,
        "logprobs": 20,
    },
    "log-probabilities of a thousand choices": {"prompt": ["a"] * 64, "n": 16, "max_tokens": 20, "logprobs": 20},
    "stop strings that are alike": {
        "prompt": [[5] * 20] * 64,
        "n": 4,
        "max_tokens": 100,
        "stop": ["a" * (250 - i) + "b" for i in range(16)],
    },
    "usage with every chunk of a thousand choices": {
        "prompt": ["a"] * 64,
        "n": 16,
        "max_tokens": 8,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    },
}


@pytest.mark.parametrize("kind", COSTLY)
def test_others_are_answered_while_a_costly_request_runs(server: RunningServer, kind: str) -> None:
    answer, count = answers_of_others(server, COSTLY[kind])
    assert answer.status_code == 200, answer.text[:300]
    assert count > 10, "a blocked event loop answers once, when it is free"


def test_an_echo_is_whole_in_both_forms(server: RunningServer) -> None:
    """Its rows come in several pieces."""
    body = {"prompt": [list(range(10, 300))] * 2, "max_tokens": 3, "echo": True, "logprobs": 2}
    whole = server.post(PATH, **body).json()["choices"]
    lines = server.post(PATH, **body, stream=True).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    for index, choice in enumerate(whole):
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == index]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for part in parts for value in part["logprobs"][name]] == values
            assert len(values) == 293
        assert choice["logprobs"]["top_logprobs"][0] is None
        assert len(choice["logprobs"]["top_logprobs"][1]) == 2


def test_prompt_logprobs_are_those_of_the_whole_prompt(server: RunningServer) -> None:
    [choice] = server.post(PATH, prompt=list(range(10, 300)), max_tokens=1, prompt_logprobs=2).json()["choices"]
    assert choice["prompt_logprobs"][0] is None
    assert [next(iter(row)) for row in choice["prompt_logprobs"][1:]] == [str(i) for i in range(11, 300)]


@pytest.mark.parametrize(
    ("body", "param", "limit"),
    [
        ({"prompt": [[5] * 500] * 64, "n": 4, "echo": True, "logprobs": 20}, "prompt_logprobs", MAX_PROMPT_LOGPROBS),
        ({"prompt": [[5] * 500] * 64, "n": 4, "prompt_logprobs": 20}, "prompt_logprobs", MAX_PROMPT_LOGPROBS),
        ({"prompt": ["a"] * 64, "n": 16, "max_tokens": 400, "logprobs": 20}, "logprobs", MAX_OUTPUT_LOGPROBS),
    ],
)
def test_more_log_probabilities_than_an_answer_holds_are_refused(
    server: RunningServer, body: dict[str, Any], param: str, limit: int
) -> None:
    answer = server.post(PATH, **{"max_tokens": 1, **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert f"the limit for one request is {limit}." in error["message"]


def test_a_single_choice_may_have_all_of_its_log_probabilities(server: RunningServer) -> None:
    assert server.post(PATH, prompt="a", max_tokens=400, logprobs=20).status_code == 200


def test_what_cannot_be_resumed_is_refused_before_it_is_read(server: RunningServer) -> None:
    body = {"prompt": "x", "max_tokens": 5, "resume_token_ids": [7] * (1 << 20), "stop": ["q" * 200]}
    answer, _ = answers_of_others(server, body)
    assert answer.status_code == 400
    assert "the output is complete" in answer.json()["error"]["message"]
    assert answer.json()["error"]["code"] == "output_complete"


def test_a_long_queue_of_commands_is_taken_in_between_steps() -> None:
    """The engine's loop takes some, runs a step, and takes more; their order stays."""

    class Pulse:
        def touch(self, *, busy: bool) -> None:
            """Nobody watches."""

    inbox = SocketInbox.__new__(SocketInbox)
    inbox._status = Pulse()  # type: ignore[assignment]
    inbox._commands = deque([iter(range(100)), iter([100, 101]), iter(range(102, 150))])  # type: ignore[list-item]
    inbox._running = deque()
    inbox._socket = type("Empty", (), {"get": lambda *_: 0})()
    taken = []
    while some := inbox.poll(0.0):
        assert len(some) <= 64
        taken += some
    assert taken == list(range(150))
