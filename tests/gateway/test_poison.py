"""A request that makes any replica fail is at fault itself: two are tried, and it counts against none."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from gateways_for_tests import RunningGateway, running_gateway, until

from powerband.dispatch.breaker import RetryBudgets
from powerband.gateway.options import PoolOptions

NUM_REPLICAS = 4
GOOD = {"model": "m", "prompt": "good", "max_tokens": 2}
POISON = {"model": "m", "prompt": "poison", "max_tokens": 2}
ANSWER = {
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "text": " yes", "logprobs": None, "finish_reason": "length"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
}
FAILURE = {"error": {"message": "Not finite.", "type": "server_error", "param": None, "code": "not_finite"}}


class Replica:
    """Fails with the prompt "poison", and with every request while it `is_broken`. `code`: what it then says."""

    def __init__(self) -> None:
        self.num_poisoned = 0
        self.is_broken = False
        self.code = "not_finite"
        replica = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer(200, {"status": "ok", "engine_restarts": 0})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fails = body["prompt"] == "poison" or replica.is_broken
                replica.num_poisoned += fails
                failure = {"error": {**FAILURE["error"], "code": replica.code}}
                self.answer(500 if fails else 200, failure if fails else ANSWER)

            def answer(self, status: int, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                """Be silent."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[tuple[RunningGateway, list[Replica]]]:
    """A gateway before replicas that have all answered something."""
    with contextlib.ExitStack() as stack:
        gateway = stack.enter_context(running_gateway(tmp_path))
        replicas = [Replica() for _ in range(NUM_REPLICAS)]
        for replica in replicas:
            stack.callback(replica.close)
        addresses = [{"id": f"r{i}", "url": one.url, "model": "m"} for i, one in enumerate(replicas)]
        routes = {"revision": "1", "models": [{"name": "m", "replicas": addresses}]}
        gateway.admin.put("/admin/routes", json=routes).raise_for_status()
        until(lambda: set(gateway.replica_states().values()) == {"ready"})
        yield gateway, replicas


def used(gateway: RunningGateway) -> set[str]:
    """Replicas that ended an answer."""
    return {one["replicas"][-1] for one in gateway.records(0) if one["status"] == 200}


def test_poison_is_tried_twice_and_counts_against_no_replica(service: tuple[RunningGateway, list[Replica]]) -> None:
    gateway, replicas = service
    until(lambda: gateway.post("/v1/completions", GOOD).status_code == 200 and len(used(gateway)) == NUM_REPLICAS)
    answers = [gateway.post("/v1/completions", POISON) for _ in range(10)]
    assert [answer.status_code for answer in answers] == [400] * 10
    assert answers[0].json()["error"]["code"] == "request_fails"
    assert sum(replica.num_poisoned for replica in replicas) == 20
    assert set(gateway.replica_states().values()) == {"ready"}


def test_without_good_answers_meanwhile_the_request_is_not_accused(
    service: tuple[RunningGateway, list[Replica]],
) -> None:
    gateway, replicas = service
    assert gateway.post("/v1/completions", POISON).status_code == 502
    assert sum(replica.num_poisoned for replica in replicas) == 2


def test_a_replica_that_alone_fails_is_at_fault(service: tuple[RunningGateway, list[Replica]]) -> None:
    gateway, replicas = service
    replicas[0].is_broken = True
    statuses = []
    until(
        lambda: (
            statuses.append(gateway.post("/v1/completions", GOOD).status_code)
            or gateway.replica_states()["r0"] == "open"
        )
    )
    assert set(statuses) == {200}


def test_poison_without_retries_left_opens_no_circuit_breaker(
    service: tuple[RunningGateway, list[Replica]],
) -> None:
    """One key sends more of it than its retry budget holds: 10 in 10 s."""
    gateway, _ = service
    until(lambda: gateway.post("/v1/completions", GOOD).status_code == 200 and len(used(gateway)) == NUM_REPLICAS)
    with ThreadPoolExecutor(40) as clients:
        answers = [clients.submit(gateway.post, "/v1/completions", POISON) for _ in range(40)]
        until(lambda: all(answer.done() for answer in answers))
    statuses = [answer.result().status_code for answer in answers]
    assert statuses.count(502) >= 20, "the budget is used up"
    assert set(gateway.replica_states().values()) == {"ready"}


def test_replicas_that_fail_in_different_ways_are_not_taken_for_poison(
    service: tuple[RunningGateway, list[Replica]],
) -> None:
    gateway, replicas = service
    for number, replica in enumerate(replicas):
        replica.code = f"fault_{number}"
    answer = gateway.post("/v1/completions", POISON)
    assert answer.status_code == 502
    assert sum(replica.num_poisoned for replica in replicas) == 3  # max_attempts


def test_second_attempts_of_one_tenant_take_nothing_from_another() -> None:
    budgets = RetryBudgets(PoolOptions())
    assert sum(budgets.take(100.0, 0, "noisy") for _ in range(50)) == 10
    assert budgets.take(100.0, 0, "quiet")
    assert sum(budgets.take(111.0, 0, "noisy") for _ in range(50)) == 10
    assert budgets.taken == 21


def test_budgets_that_nobody_uses_are_not_kept() -> None:
    budgets = RetryBudgets(PoolOptions())
    for number in range(1000):
        budgets.take(20.0 * number, 0, number)
    assert len(budgets._budgets) == 1
