"""What clients do wrong: always answered with a 4xx in OpenAI's shape, and nobody else notices."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateways_for_tests import RunningGateway, asking, gateway_before, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from powerband.bench.client.messages import ServerAddress
from powerband.fault_injection.corpus import malformed_requests
from powerband.mock_server.behavior import Behavior, words

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    script = Behavior(tpot_s=0.001)
    with gateway_before(tmp_path_factory.mktemp("gateway"), script, script) as running:
        yield running
        assert "Traceback" not in (running.database.parent / "gateway.log").read_text()


def refusal(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error object."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"].startswith("req_")
    assert len(answer.content) < 2000
    return error


def raw(gateway: RunningGateway, request: bytes) -> bytes:
    """What the gateway answers to these bytes; b'' when it just closes the connection."""
    with socket.create_connection(address(gateway), timeout=60) as client:
        with contextlib.suppress(OSError):  # it may have closed the connection already
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(OSError):
            while piece := client.recv(65536):
                answer += piece
    return answer


def address(gateway: RunningGateway) -> tuple[str, int]:
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    return host, int(port)


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_no_malformed_request_is_the_servers_fault(gateway: RunningGateway, endpoint: Any) -> None:
    target = ServerAddress(base=gateway.url, endpoint=endpoint, model="scripted")
    for name, request in malformed_requests(target).items():
        answer = raw(gateway, request)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert not answer or head.split(b" ", 2)[1][:1] in b"24", f"{name}: {head[:80]!r}"
        if head.startswith(b"HTTP/1.1 4") and b"x-request-id" in head:
            first, _ = json.JSONDecoder().raw_decode(body.decode())  # what follows a short body may have an answer, too
            assert "error" in first, name
    assert gateway.http.get("/readyz").status_code == 200


BODIES = [
    (b"", 400, "not valid JSON"),
    (b"[1]", 400, "'body' is [1]"),
    (b'{"prompt": "a", "n": "2"}', 400, "'n' is \"2\""),
    (b'{"prompt": "a", "n": 0}', 400, "a whole number from 1 to 128"),
    (b'{"prompt": "a", "stream": 1}', 400, "'stream' is 1"),
    (b'{"prompt": "a", "stream_options": []}', 400, "'stream_options' is []"),
    (b'{"prompt": "a", "max_tokens": -1}', 400, "a whole number from 0"),
    (b'{"prompt": "a", "deadline_s": 0}', 400, "a number above 0"),
    (b'{"prompt": "a", "model": "other"}', 404, "There is no model 'other'"),
    (b'{"model": "scripted"}', 400, "'prompt' is missing"),
    (b"[" * 100_000, 400, "nested deeper than 64"),
    (b'{"prompt": "' + b"a" * (5 << 20) + b'"}', 413, "larger than"),
]


@pytest.mark.parametrize(("body", "status", "said"), BODIES, ids=range(len(BODIES)))
def test_a_wrong_body_is_refused_with_its_reason(gateway: RunningGateway, body: bytes, status: int, said: str) -> None:
    for _ in range(2):  # the connection goes on
        assert said in refusal(gateway.http.post(TEXT, content=body, headers=JSON), status)["message"]


def test_what_is_not_plain_json_is_refused(gateway: RunningGateway) -> None:
    zipped = gateway.http.post(TEXT, content=b"\x1f\x8b", headers={**JSON, "Content-Encoding": "gzip"})
    assert refusal(zipped, 415)["code"] == "unsupported_encoding"
    assert refusal(gateway.http.post(TEXT, data={"prompt": "a"}), 415)["code"] == "unsupported_media_type"


def test_unknown_paths_and_methods(gateway: RunningGateway) -> None:
    assert refusal(gateway.admin.get("/v2/models"), 404)["code"] == "not_found"
    wrong = gateway.http.get(CHAT)
    assert (refusal(wrong, 405)["code"], wrong.headers["allow"]) == ("method_not_allowed", "POST")
    for path in ("//v1/models", "/v1/models/../../admin/routes", "/admin/routes", "/anything"):
        assert gateway.http.get(path).status_code in (401, 404), path


def test_pages_from_elsewhere_stay_outside(gateway: RunningGateway) -> None:
    assert refusal(gateway.http.get("/v1/models", headers={"Host": "evil.example"}), 403)["code"] == "host_not_allowed"
    for method, path in (("GET", "/admin/routes"), ("PUT", "/admin/routes"), ("POST", "/admin/drain")):
        asked = gateway.admin.request(method, path, headers={"Origin": "https://evil.example"}, json={})
        assert refusal(asked, 403)["code"] == "origin_not_allowed"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = ("prompt", "messages", "model", "stream", "stream_options", "n", "max_tokens", "user", "cache_salt", "tools")
BODY = st.dictionaries(st.sampled_from((*FIELDS, "priority", "deadline_s", "stop", "logprobs", "any")), VALUES)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODY, path=st.sampled_from((CHAT, TEXT, "/tokenize", "/detokenize", "/v1/feedback")), keyed=st.booleans())
def test_whatever_is_sent_is_answered(gateway: RunningGateway, body: dict[str, Any], path: str, keyed: bool) -> None:
    client = gateway.admin if keyed else gateway.http
    data = json.dumps({"prompt": "a", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2, **body})
    answer = client.post(path, content=data.encode("utf-8", "surrogatepass"), headers=JSON)
    assert answer.status_code < 500, answer.text


def test_a_client_that_leaves_ends_its_request_at_the_replica(gateway: RunningGateway) -> None:
    def cancelled() -> int:
        return sum(truth["is_cancelled"] for replica in gateway.replicas for truth in replica.truths())

    def left() -> list[tuple[int, str]]:
        told = [one for one in gateway.records(newest) if one["error"] == "client_left"]
        return [(one["status"], one["record"]["outcome"]) for one in told]

    def begun() -> int:
        return sum(len(replica.truths()) for replica in gateway.replicas)

    before, newest = cancelled(), gateway.admin.get("/admin/records").json()["newest"]
    with gateway.http.stream("POST", TEXT, json={"prompt": "leaves", "max_tokens": 60_000, "stream": True}) as answer:
        next(answer.iter_lines())
    num_begun = begun()
    with asking(gateway, TEXT, {"prompt": "leaves", "max_tokens": 60_000}):
        until(lambda: begun() == num_begun + 1)
    until(lambda: cancelled() == before + 2)
    until(lambda: left() == [(499, "aborted")] * 2)


def test_a_client_that_does_not_read_takes_no_memory(gateway: RunningGateway) -> None:
    def memory_kib() -> int:
        lines = Path(f"/proc/{gateway.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

    def told() -> int:
        return sum(truth["tokens"] for replica in gateway.replicas for truth in replica.truths())

    body = json.dumps({"prompt": "a", "max_tokens": 60_000, "stream": True}).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    before_kib, before = memory_kib(), told()
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            client = stack.enter_context(socket.create_connection(address(gateway)))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(request)
        time.sleep(1.0)
        assert gateway.stream(TEXT, {"prompt": "b", "max_tokens": 5})[-1] == "[DONE]"
        assert told() > before
        assert memory_kib() - before_kib < 8 << 10


def test_a_text_passes_unharmed(gateway: RunningGateway) -> None:
    text = 'quote " backslash \\ , "token_ids":[1,2] ,"usage":null \u2028 \U0001f600'
    answer = gateway.post(CHAT, {"messages": [{"role": "user", "content": text}], "max_tokens": 3})
    assert answer.json()["choices"][0]["message"]["content"] == words(0, 3)
