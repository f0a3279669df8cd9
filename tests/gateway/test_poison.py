"""A request that makes any replica fail is at fault itself: two are tried, and it counts against none."""

from __future__ import annotations

import contextlib
import json
import socket
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
CHAT = {"model": "m", "messages": [{"role": "user", "content": "poison"}], "max_tokens": 2}
ANSWER = {
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "text": " yes", "logprobs": None, "finish_reason": "length"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
}
ROLE = {"id": "1", "model": "m", "choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]}
FAILURE = {"error": {"message": "Not finite.", "type": "server_error", "param": None, "code": "not_finite"}}


class Replica:
    """Fails with the prompt "poison", and with every request while it `is_broken`. `code`: what it then says.

    A stream fails with an event. "crash", "hang" and "hang at once" do that to the replica; it is back `back_after_s`
    later. "wait" is answered once the replica has crashed twice, and `num_bystanders` of these run at each crash.
    """

    num_bystanders = 0

    def __init__(self, back_after_s: float = 0.3) -> None:
        self.num_poisoned = self.num_ends = 0
        self.is_broken = False
        self.code = "not_finite"
        self.back_after_s = back_after_s
        self.port = 0
        self.probed = threading.Condition()
        self.awake = threading.Event()
        self.awake.set()
        self.waiting = threading.Condition()
        self.num_waiting = 0
        self.connections: set[socket.socket] = set()
        self.timers: list[threading.Timer] = []
        self.start()

    def start(self) -> None:
        replica = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                replica.connections.add(self.connection)

            def do_GET(self) -> None:
                replica.awake.wait()
                self.answer(200, {"status": "ok", "engine_restarts": 0})
                with replica.probed:
                    replica.probed.notify_all()

            def do_POST(self) -> None:
                replica.awake.wait()
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
                if prompt in ("crash", "hang", "hang at once"):
                    self.close_connection = True
                    replica.crash() if prompt == "crash" else replica.hang(at_once=prompt != "hang")
                    return
                if prompt == "wait" and replica.num_ends < 2:
                    replica.wait()
                    self.close_connection = True
                    return
                fails = prompt == "poison" or replica.is_broken
                replica.num_poisoned += fails
                failure = {"error": {**FAILURE["error"], "code": replica.code}}
                if fails and body.get("stream"):
                    self.answer_stream([ROLE, failure] if "messages" in body else [failure])
                else:
                    self.answer(500 if fails else 200, failure if fails else ANSWER)

            def answer(self, status: int, value: Any) -> None:
                self.answer_with(status, "application/json", json.dumps(value).encode())

            def answer_stream(self, events: list[Any]) -> None:
                data = "".join(f"data: {one}\n\n" for one in (*map(json.dumps, events), "[DONE]"))
                self.answer_with(200, "text/event-stream", data.encode())

            def answer_with(self, status: int, kind: str, data: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                """Be silent."""

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """Be silent."""

        self.server = Server(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def crash(self) -> None:
        """As when its process is killed: nothing listens, and its connections end."""
        if self.num_ends < 2:
            with self.waiting:
                self.waiting.wait_for(lambda: self.num_waiting == self.num_bystanders)
        self.num_ends += 1
        self.stop()
        with self.waiting:
            self.num_waiting = 0
            self.waiting.notify_all()
        self.back(self.start)

    def wait(self) -> None:
        """Until the replica crashes."""
        with self.waiting:
            self.num_waiting += 1
            self.waiting.notify_all()
            self.waiting.wait_for(lambda: not self.num_waiting)

    def hang(self, *, at_once: bool) -> None:
        """As when its process is stopped as soon as it got the request, or some time after that."""
        self.num_ends += 1
        with self.probed:
            if not at_once:
                self.probed.wait()
        self.awake.clear()
        self.back(self.awake.set, 6.0)
        self.awake.wait()

    def back(self, how: Any, after_s: float = 0.0) -> None:
        self.timers.append(threading.Timer(after_s or self.back_after_s, how))
        self.timers[-1].start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        while self.connections:
            with contextlib.suppress(OSError):
                self.connections.pop().shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for timer in self.timers:
            timer.join()
        self.stop()
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


@pytest.mark.parametrize("body", [POISON, CHAT], ids=["at once", "after the role"])
def test_poison_that_is_reported_within_a_stream_counts_against_no_replica(
    service: tuple[RunningGateway, list[Replica]], body: dict[str, Any]
) -> None:
    gateway, replicas = service
    until(lambda: gateway.post("/v1/completions", GOOD).status_code == 200 and len(used(gateway)) == NUM_REPLICAS)
    path = "/v1/chat/completions" if body is CHAT else "/v1/completions"
    answers = [gateway.post(path, {**body, "stream": True}) for _ in range(10)]
    assert {answer.status_code for answer in answers} == ({200} if body is CHAT else {400})
    assert all('"code":"request_fails"' in answer.text for answer in answers)
    assert sum(replica.num_poisoned for replica in replicas) == 20
    assert set(gateway.replica_states().values()) == {"ready"}


@pytest.mark.parametrize("prompt", ["crash", "hang", "hang at once"])
def test_a_request_that_ends_replicas_ends_two_at_most(
    service: tuple[RunningGateway, list[Replica]], prompt: str
) -> None:
    """Although those that crashed are soon back, and others serve."""
    gateway, replicas = service
    until(lambda: gateway.post("/v1/completions", GOOD).status_code == 200 and len(used(gateway)) == NUM_REPLICAS)
    answer = gateway.post("/v1/completions", {**GOOD, "prompt": prompt})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "request_fails")
    assert "crashed or hung twice while they ran this request" in answer.json()["error"]["message"]
    assert sum(replica.num_ends for replica in replicas) == 2
    assert gateway.post("/v1/completions", GOOD).status_code == 200
    assert sum(replica.num_ends for replica in replicas) == 2


def test_a_request_that_crashes_the_only_replica_crashes_it_twice_at_most(tmp_path: Path) -> None:
    with running_gateway(tmp_path) as gateway:
        replica = Replica()
        route = {
            "revision": "1",
            "models": [{"name": "m", "replicas": [{"id": "r", "url": replica.url, "model": "m"}]}],
        }
        gateway.admin.put("/admin/routes", json=route).raise_for_status()
        until(lambda: gateway.post("/v1/completions", GOOD).status_code == 200)
        assert gateway.post("/v1/completions", {**GOOD, "prompt": "crash"}).status_code == 400
        assert replica.num_ends == 2
        assert gateway.post("/v1/completions", GOOD).status_code == 200
        replica.close()


def test_requests_that_were_in_flight_at_the_crashes_of_another_are_answered(tmp_path: Path) -> None:
    """Each of them starts alone after the second crash, so the third shows whose fault it was."""
    with running_gateway(tmp_path) as gateway, ThreadPoolExecutor(4) as clients:
        replica = Replica()
        replica.num_bystanders = 3
        addresses = [{"id": "r", "url": replica.url, "model": "m"}]
        routes = {"revision": "1", "models": [{"name": "m", "replicas": addresses}]}
        gateway.admin.put("/admin/routes", json=routes).raise_for_status()
        until(lambda: gateway.post("/v1/completions", GOOD).status_code == 200)
        waits = [clients.submit(gateway.post, "/v1/completions", {**GOOD, "prompt": "wait"}) for _ in range(3)]
        crashes = gateway.post("/v1/completions", {**GOOD, "prompt": "crash"})
        assert [wait.result().status_code for wait in waits] == [200] * 3
        assert (crashes.status_code, crashes.json()["error"]["code"]) == (400, "request_fails")
        assert "crashed or hung 3 times" in crashes.json()["error"]["message"]
        assert replica.num_ends == 3
        replica.close()


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
