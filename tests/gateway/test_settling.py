"""However a request ends, its key is charged once for what was used, and nothing of what it had taken stays taken."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateways_for_tests import RunningGateway, asking, gateway_before, running_gateway, until

from powerband.mock_server.behavior import Behavior

WORDS = "word " * 400  # about 500 tokens by its bytes


@dataclass
class Client:
    """One key of a gateway."""

    gateway: RunningGateway
    id: str
    http: httpx.Client

    def used(self) -> dict[str, Any]:
        found: dict[str, Any] = self.gateway.admin.get(f"/admin/keys/{self.id}").json()["used"]
        return found

    def body(self, **fields: Any) -> dict[str, Any]:
        return {"model": "scripted", "prompt": WORDS, "max_tokens": 20, **fields}

    def ask(self, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json=self.body(**fields))

    def leave_after(self, lines: int, **fields: Any) -> None:
        """Read so many lines of a stream, and close the connection."""
        with self.http.stream("POST", "/v1/completions", json=self.body(stream=True, **fields)) as answer:
            for _, _line in zip(range(lines), answer.iter_lines(), strict=False):
                pass

    def leave_while_it_runs(self, after_s: float = 0.0, **fields: Any) -> None:
        """Before anything was answered. after_s: what may have been made meanwhile is charged by the time."""
        key = self.http.headers["Authorization"].removeprefix("Bearer ")
        body = {name: value for name, value in self.body(**fields).items() if value is not None}
        with asking(self.gateway, "/v1/completions", body, key):
            until(lambda: self.used()["running"] == 1)
            time.sleep(after_s)
        until(lambda: self.used()["running"] == 0)

    def settled(self, requests: int = 1) -> dict[str, Any]:
        """What is used when nothing runs any more; also what the books then say it cost is the same."""
        until(lambda: self.used()["running"] == 0 and self.used()["requests_last_min"] == requests)
        until(lambda: self.row().get("cost_usd", 0.0) == pytest.approx(self.used()["usd"]))
        return self.used()

    def row(self) -> dict[str, Any]:
        rows = self.gateway.admin.get("/admin/usage?by=key&since=1h").json()["data"]
        return next((row for row in rows if row["key"] == self.id), {})


def client_of(gateway: RunningGateway, **limits: Any) -> Client:
    """With prices, so that spend is counted as well."""
    routes = gateway.admin.get("/admin/routes").json()["routes"]
    prices = {"usd_per_million_input": 1e3, "usd_per_million_output": 1e4}
    routes["models"][0] |= prices
    gateway.admin.put("/admin/routes", json={**routes, "revision": "priced"})
    key = gateway.admin.post("/admin/keys", json={"name": "app", "limits": limits}).json()
    http = httpx.Client(base_url=gateway.url, timeout=30, headers={"Authorization": f"Bearer {key['secret']}"})
    return Client(gateway, key["id"], http)


@pytest.fixture
def gateway(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunningGateway]:
    scripts, flags = request.param
    with gateway_before(tmp_path, *scripts, arguments=flags) as running:
        yield running


@pytest.fixture(scope="module")
def paced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with gateway_before(tmp_path_factory.mktemp("gateway"), Behavior(ttft_s=0.02, tpot_s=0.005)) as running:
        yield running


def before(*scripts: Behavior, flags: tuple[str, ...] = ()) -> Any:
    return pytest.mark.parametrize("gateway", [(scripts, flags)], indirect=True, ids=[""])


def test_what_a_replica_counts_is_what_is_charged(paced: RunningGateway) -> None:
    client = client_of(paced, tokens_per_min=100_000, usd=100.0)
    usage = client.ask().json()["usage"]
    client.leave_after(1000, stream_options={"include_usage": True})  # after the end
    used = client.settled(requests=2)
    assert used["tokens_last_min"] == 2 * usage["total_tokens"]
    assert used["usd"] == pytest.approx(2 * (usage["prompt_tokens"] * 1e-3 + usage["completion_tokens"] * 1e-2))
    assert (client.row()["requests"], client.row()["output_tokens"]) == (2, 2 * usage["completion_tokens"])


def test_nothing_that_a_client_writes_makes_a_request_another_keys(paced: RunningGateway) -> None:
    mine, other = client_of(paced, requests_per_min=2), client_of(paced, requests_per_min=2)
    claims = {"X-Api-Key": "other", "X-Tenant": other.id, "X-User": other.id, "Cookie": f"key={other.id}"}
    for _ in range(3):
        answer = mine.http.post("/v1/completions", json=mine.body(user=other.id), headers=claims)
    assert answer.status_code == 429
    assert (mine.used()["requests_last_min"], other.used()["requests_last_min"]) == (2, 0)


def test_who_leaves_pays_for_what_was_made(paced: RunningGateway) -> None:
    client = client_of(paced, tokens_per_min=100_000, max_concurrency=1)
    client.leave_after(8, max_tokens=1000)  # event, blank, event, …
    used = client.settled()
    prompt = used["tokens_last_min"] - client.row()["output_tokens"]
    assert 3 <= client.row()["output_tokens"] < 200
    assert 400 <= prompt <= 600
    assert client.ask(max_tokens=1).status_code == 200  # the one place is free again


@before(Behavior(ttft_s=30.0))
def test_who_leaves_before_the_first_token_has_used_a_prompt(gateway: RunningGateway) -> None:
    client = client_of(gateway, tokens_per_min=100_000)
    for stream in (True, False):
        client.leave_while_it_runs(0.3, stream=stream, max_tokens=9)
    used = client.settled(requests=2)
    row = client.row()
    assert 800 <= row["prompt_tokens"] <= 1200
    assert row["output_tokens"] == 9  # of the whole answer, which may have been made; of the stream nothing came
    assert used["tokens_last_min"] == row["prompt_tokens"] + row["output_tokens"]
    assert used["usd"] == pytest.approx(row["prompt_tokens"] * 1e-3 + 9e-2)
    assert row["estimated"] == 2


@before(Behavior(ttft_s=30.0))
def test_a_whole_answer_that_its_client_leaves_costs_no_more_than_its_limit(gateway: RunningGateway) -> None:
    client = client_of(gateway, tokens_per_min=100_000)
    client.leave_while_it_runs(1.0, max_tokens=None)
    client.settled()
    assert client.row()["output_tokens"] == 16  # what a completion without a limit has at most; a second is worth 100


@before(
    Behavior(tpot_s=0.01, drop_every=2, drop_after_chunks=4), Behavior(tpot_s=0.01, drop_every=2, drop_after_chunks=4)
)
def test_a_stream_that_another_replica_ends_is_charged_once(gateway: RunningGateway) -> None:
    client = client_of(gateway, tokens_per_min=100_000)
    usage = client.ask().json()["usage"]
    for _ in range(4):
        client.leave_after(1000)
    used = client.settled(requests=5)
    assert any(record["resumed"] for record in gateway.records())
    assert used["tokens_last_min"] == 5 * usage["total_tokens"]
    assert client.row()["requests"] == 5


@before(Behavior(fail_every=1), Behavior())
def test_a_retry_is_charged_once(gateway: RunningGateway) -> None:
    client = client_of(gateway, tokens_per_min=100_000, requests_per_min=100)
    answers = [client.ask() for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert client.settled(requests=3)["tokens_last_min"] == 3 * answers[0].json()["usage"]["total_tokens"]


@before(Behavior(fail_every=1))
def test_what_failed_costs_no_tokens(gateway: RunningGateway) -> None:
    client = client_of(gateway, tokens_per_min=100_000)
    assert client.ask().status_code == 502
    used = client.settled()
    assert (used["tokens_last_min"], used["usd"]) == (0, 0.0)


@before(Behavior(), flags=("--max-queue-wait-s", "2"))
def test_what_never_got_to_a_replica_counts_for_nothing(gateway: RunningGateway) -> None:
    client = client_of(gateway, tokens_per_min=100_000)
    routes = gateway.admin.get("/admin/routes").json()["routes"]
    routes["models"][0]["replicas"] = []
    gateway.admin.put("/admin/routes", json={**routes, "revision": "none"})
    client.leave_while_it_runs()
    assert client.ask().status_code == 503
    until(lambda: client.used()["running"] == 0)
    used = client.used()
    assert (used["requests_last_min"], used["tokens_last_min"], used["running"]) == (0, 0, 0)
    until(lambda: client.row().get("refused") == 1)


def test_a_crowd_through_the_gateway_is_held_to_every_limit(paced: RunningGateway) -> None:
    """100 at once, and then one after the other: no more run than may, and no more tokens are used than may be."""
    client = client_of(paced, tokens_per_min=12_000, max_concurrency=4)
    most, over = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.is_set():
            most = max(most, client.used()["running"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(100) as crowd:
        answers = list(crowd.map(lambda _: client.ask(), range(100)))
    over.set()
    watcher.join()
    until(lambda: client.used()["running"] == 0)
    while answers[-1].status_code != 429 or answers[-1].json()["error"]["code"] != "tokens_limit":
        assert len(answers) < 200, "some 28 use all tokens"
        answers.append(client.ask())
    served = [answer for answer in answers if answer.status_code == 200]
    codes = {answer.json()["error"]["code"] for answer in answers if answer.status_code == 429}
    assert len(served) + sum(answer.status_code == 429 for answer in answers) == len(answers)
    assert codes == {"concurrency_limit", "tokens_limit"}
    assert 1 <= most <= 4
    used = sum(answer.json()["usage"]["total_tokens"] for answer in served)
    assert client.settled(requests=len(served))["tokens_last_min"] == used <= 12_000
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)


@before(Behavior())
def test_books_survive_a_gateway_that_is_killed(gateway: RunningGateway, tmp_path: Path) -> None:
    client = client_of(gateway, usd=100.0, usd_period="total")
    client.ask()
    spent = client.settled()["usd"]
    gateway.process.kill()
    gateway.process.wait()
    with running_gateway(tmp_path, f"--replica={gateway.replicas[0].url}") as again:
        assert again.admin.get(f"/admin/keys/{client.id}").json()["used"]["usd"] == pytest.approx(spent)
        assert again.admin.get("/admin/audit?check=1").json()["broken_at"] is None
        headers = client.http.headers
        until(lambda: set(again.replica_states().values()) == {"ready"})
        assert again.http.post("/v1/completions", json=client.body(), headers=headers).status_code == 200


@before(Behavior())
def test_tokens_that_are_looked_up_count_against_the_limits_and_are_in_the_books(gateway: RunningGateway) -> None:
    """A replica reads them as it does a prompt's; nothing is made that has a price."""
    client = client_of(gateway, requests_per_min=3, tokens_per_min=1000)
    statuses = [client.http.post("/detokenize", json={"tokens": list(range(100))}).status_code for _ in range(9)]
    assert statuses == [200] * 3 + [429] * 6
    used = client.used()
    assert (used["requests_last_min"], used["tokens_last_min"], used["usd"]) == (3, 300, 0.0)
    until(lambda: client.row().get("requests") == 9)
    assert (client.row()["refused"], client.row()["prompt_tokens"], client.row()["cost_usd"]) == (6, 300, 0.0)
    other = client_of(gateway, tokens_per_min=90)
    assert other.http.post("/tokenize", json={"prompt": "word " * 100}).status_code == 400
    until(lambda: other.row().get("refused") == 1)
    assert client_of(gateway, usd=0.0).http.post("/detokenize", json={"tokens": [1]}).status_code == 429


@before(Behavior(max_model_len=1 << 16))
def test_what_names_no_limit_makes_no_more_than_is_left(gateway: RunningGateway) -> None:
    client = client_of(gateway, tokens_per_min=3000)

    def chat(_number: int) -> httpx.Response:
        return client.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a" * 40}]})

    with ThreadPoolExecutor(20) as crowd:
        answers = list(crowd.map(chat, range(20)))
    served = [answer.json()["usage"]["total_tokens"] for answer in answers if answer.status_code == 200]
    assert served
    assert client.settled(requests=len(served))["tokens_last_min"] == sum(served) <= 3000
