"""A gateway from its start to its end: routes that change while it runs and outlive it, drains, signals, mistakes."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateways_for_tests import RunningGateway, gateway_before, running_gateway, scripted_replica, text_of, until

from powerband.mock_server.behavior import Behavior, words

TEXT = {"model": "scripted", "prompt": "one two three", "max_tokens": 3}
SLOW = Behavior(tpot_s=0.02)


def routes_to(*urls: str, revision: str = "1", **model: Any) -> dict[str, Any]:
    replicas = [{"id": f"r{number}", "url": url, "model": "scripted"} for number, url in enumerate(urls)]
    return {"revision": revision, "models": [{"name": "scripted", "replicas": replicas, **model}]}


class Streaming(threading.Thread):
    """One stream of 100 tokens, two seconds long, read by a thread. `lines`: what came."""

    def __init__(self, gateway: RunningGateway) -> None:
        super().__init__(daemon=True)
        self._url = f"{gateway.url}/v1/completions"
        self.lines: list[str] = []
        self.problem: Exception | None = None
        self.start()
        until(lambda: len(self.lines) > 3)

    def run(self) -> None:
        body = {**TEXT, "max_tokens": 100, "stream": True}
        try:
            with httpx.stream("POST", self._url, json=body, timeout=60) as answer:
                self.lines.extend(line for line in answer.iter_lines() if line)
        except httpx.TransportError as problem:
            self.problem = problem

    @property
    def is_whole(self) -> bool:
        self.join(60)
        return self.problem is None and self.lines[-1] == "data: [DONE]" and len(self.lines) == 101


def test_routes_are_replaced_while_streams_run(tmp_path: Path) -> None:
    with scripted_replica(SLOW) as old, scripted_replica() as new, running_gateway(tmp_path) as gateway:
        assert gateway.http.get("/readyz").status_code == 503
        assert gateway.post("/v1/completions", TEXT).json()["error"]["code"] == "model_not_found"
        assert gateway.admin.put("/admin/routes", json=routes_to(old.url)).status_code == 200
        until(lambda: gateway.http.get("/readyz").status_code == 200)
        stream = Streaming(gateway)
        changed = routes_to(new.url, revision="2", aliases=["other"])
        changed["models"][0]["replicas"][0]["id"] = "new"
        for _ in range(2):  # the same again changes nothing
            told = gateway.admin.put("/admin/routes", json=changed).json()
            assert [one["id"] for one in told["pools"][0]["replicas"]][-1:] == ["new"]
        assert [card["id"] for card in gateway.http.get("/v1/models").json()["data"]] == ["scripted", "other"]
        answer = gateway.post("/v1/completions", {**TEXT, "model": "other"})
        assert answer.json()["choices"][0]["text"] == words(0, 3)
        assert gateway.records()[-1]["replicas"] == ["new"]
        assert stream.is_whole


def test_models_are_listed_with_the_largest_context_of_their_replicas(tmp_path: Path) -> None:
    with gateway_before(tmp_path, Behavior(max_model_len=4096), Behavior(max_model_len=8192)) as gateway:
        [card] = gateway.http.get("/v1/models").json()["data"]
        assert card["max_model_len"] == 8192
        assert gateway.http.get(f"/v1/models/{card['id']}").json() == card


def test_a_replica_that_drains_gets_nothing_new(tmp_path: Path) -> None:
    with gateway_before(tmp_path, SLOW, Behavior()) as gateway:
        first = next(iter(gateway.replica_states()))
        assert gateway.admin.post("/admin/drain", json={"replica": first}).status_code == 200
        until(lambda: gateway.replica_states()[first] == "draining")
        before = [len(replica.truths()) for replica in gateway.replicas]
        for _ in range(4):
            assert text_of(gateway.stream("/v1/completions", TEXT)) == words(0, 3)
        after = [len(replica.truths()) for replica in gateway.replicas]
        assert sorted(b - a for a, b in zip(before, after, strict=True)) == [0, 4]
        assert (
            gateway.admin.post("/admin/drain", json={"replica": "none"}).json()["error"]["code"] == "replica_not_found"
        )
        gateway.admin.post("/admin/drain", json={"replica": first, "draining": False})
        until(lambda: gateway.replica_states()[first] == "ready")


def test_wrong_routes_change_nothing(tmp_path: Path) -> None:
    with gateway_before(tmp_path, Behavior()) as gateway:
        before = gateway.admin.get("/admin/routes").json()["routes"]
        for wrong in (
            {"models": 1},
            {"modles": []},
            routes_to("ftp://x"),
            routes_to("http://a:0x"),
            [],
            routes_to("a"),
        ):
            answer = gateway.admin.put("/admin/routes", json=wrong)
            assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error"), answer.text
        assert gateway.admin.get("/admin/routes").json()["routes"] == before
        assert gateway.post("/v1/completions", TEXT).status_code == 200


def test_a_restarted_gateway_serves_what_it_served(tmp_path: Path) -> None:
    with scripted_replica() as replica:
        with running_gateway(tmp_path) as gateway:
            routes = routes_to(replica.url, aliases=["other"])
            routes["models"][0]["replicas"][0]["api_key"] = "secret"
            gateway.admin.put("/admin/routes", json=routes)
            told = gateway.admin.get("/admin/routes").json()
        assert "secret" not in str(told)
        assert (tmp_path / "routes.json").stat().st_mode & 0o77 == 0
        with running_gateway(tmp_path) as again:
            until(lambda: again.http.get("/readyz").status_code == 200)
            assert again.admin.get("/admin/routes").json()["routes"] == told["routes"]
            assert again.post("/v1/completions", {**TEXT, "model": "other"}).status_code == 200


def test_routes_of_the_version_before_are_taken_and_served_again(tmp_path: Path) -> None:
    """A controller of that version sends `longest_prompt`, and a gateway of that version stored it."""
    with scripted_replica() as replica:
        routes = routes_to(replica.url)
        (address,) = routes["models"][0]["replicas"]
        address["longest_prompt"] = 2

        def served(gateway: RunningGateway) -> list[int | None]:
            until(lambda: gateway.http.get("/readyz").status_code == 200)
            shown = gateway.admin.get("/admin/routes").json()["routes"]["models"][0]["replicas"]
            return [one["max_prompt_tokens"] for one in shown]

        (tmp_path / "routes.json").write_text(json.dumps(routes))
        with running_gateway(tmp_path) as gateway:
            assert served(gateway) == [2]
            address["longest_prompt"] = None
            assert gateway.admin.put("/admin/routes", json={**routes, "revision": "2"}).status_code == 200
            assert served(gateway) == [None]
            stored = json.loads((tmp_path / "routes.json").read_text())["models"][0]["replicas"][0]
            assert "max_prompt_tokens" in stored
            assert "longest_prompt" not in stored


def test_the_first_signal_lets_streams_end(tmp_path: Path) -> None:
    with gateway_before(tmp_path, SLOW) as gateway:
        stream = Streaming(gateway)
        gateway.process.send_signal(signal.SIGTERM)
        until(lambda: gateway.http.get("/readyz").status_code == 503)
        refused = gateway.post("/v1/completions", TEXT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert stream.is_whole
        assert gateway.process.wait(60) == 0


def test_the_second_signal_does_not_wait(tmp_path: Path) -> None:
    with gateway_before(tmp_path, Behavior(tpot_s=1.0)) as gateway:
        body = {**TEXT, "max_tokens": 100, "stream": True}
        with gateway.http.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
            gateway.process.send_signal(signal.SIGTERM)
            until(lambda: gateway.http.get("/readyz").status_code == 503)
            gateway.process.send_signal(signal.SIGINT)
            assert gateway.process.wait(60) == 0  # the stream takes 100 s


def run(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "powerband", "gateway", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--routes=nowhere.yaml"], 3, "Cannot read nowhere.yaml"),
        (["--routes=a.yaml", "--replica=http://127.0.0.1:1"], 2, "Both --routes and --replica"),
        (["--replica=ftp://127.0.0.1:1"], 2, "'ftp://127.0.0.1:1' is not a server address."),
        (["--replica="], 2, "'' is not a server address."),
        (["--host=0.0.0.0"], 2, "would let anyone use the replicas"),
        (["--max-attempts=0"], 2, "max_attempts is 0"),
    ],
)
def test_mistakes_are_told_at_once(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    found, told = run(f"--database={tmp_path / 'gateway.db'}", "--port=0", *arguments)
    assert (found, said in told) == (code, True), told


def test_a_replica_that_does_not_answer_is_named_at_once_and_ctrl_c_ends_the_waiting(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "powerband", "gateway", "--port=0", f"--database={tmp_path / 'gateway.db'}"]
    with subprocess.Popen([*command, "--replica=127.0.0.1:1"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("waiting for the replica at http://127.0.0.1:1: " in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


def test_a_replica_that_wants_a_key_is_not_waited_for(tmp_path: Path) -> None:
    class WithKey(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

    with HTTPServer(("127.0.0.1", 0), WithKey) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        code, told = run(f"--database={tmp_path / 'gateway.db'}", "--port=0", f"--replica={url}")
        server.shutdown()
    assert code == 3
    assert f"The replica at {url} did not report which models it serves. GET /v1/models answers 401." in told
    assert "Replicas that need an API key must be listed with --routes." in told


def test_replicas_may_be_written_without_a_scheme_and_with_v1(tmp_path: Path) -> None:
    with scripted_replica() as replica:
        written = replica.url.removeprefix("http://") + "/v1"
        with running_gateway(tmp_path, f"--replica={written}") as gateway:
            assert gateway.post("/v1/completions", TEXT).status_code == 200
            body = routes_to(replica.url + "/v1")
            refused = gateway.admin.put("/admin/routes", json=body)
            assert refused.status_code == 400
            assert "Leave out /v1" in refused.text


def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, told = run(f"--database={tmp_path / 'gateway.db'}", f"--port={taken.getsockname()[1]}")
    assert (code, "Cannot listen" in told) == (3, True), told
