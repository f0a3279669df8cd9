"""What happens when things break: each failure has a bounded time to be noticed, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from servers_for_tests import SERVE_FAKE, RunningServer, free_port, running_server

ASKED = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b'Content-Length: 14\r\n\r\n{"prompt":"a"}'
)
LONG = {"prompt": "a b c", "max_tokens": 450, "stream": True}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """One server for the drills that it survives."""
    with running_server() as running:
        yield running


def until_empty(server: RunningServer, timeout_s: float = 60.0) -> float:
    """Seconds until nothing runs, nothing waits and every block is free (figures are renewed four times a second)."""
    names = ("powerband_requests_running", "powerband_requests_waiting", "powerband_kv_cache_usage_ratio")
    return server.until(lambda: not any(server.figure(name) for name in names), timeout_s)


@pytest.fixture
def slow_server() -> Iterator[RunningServer]:
    """Its streams do not end before something ends them."""
    with running_server("model=long-steps") as running:
        yield running


def test_engine_killed_in_a_stream(slow_server: RunningServer) -> None:
    server = slow_server
    with server.http.stream("POST", "/v1/completions", json=LONG) as response:
        lines = response.iter_lines()
        assert "choices" in next(lines)
        os.kill(server.engine_pid(), signal.SIGKILL)
        start_s = time.monotonic()
        last = [line for line in lines if line][-1]
        assert time.monotonic() - start_s < 20  # the stream takes 45 s
    assert '"error":{' in last
    assert "SIGKILL" in last
    assert server.http.get("/readyz").status_code == 503
    refused = server.post("/v1/completions", prompt="a")
    assert refused.status_code == 503
    assert refused.json()["error"]["type"] == "service_unavailable_error"
    server.until(lambda: server.http.get("/readyz").status_code == 200)
    assert server.http.get("/readyz").json()["engine_restarts"] == 1
    assert server.figure("powerband_engine_restarts_total") == 1
    assert server.post("/v1/completions", prompt="a b c").status_code == 200
    until_empty(server)


def test_engine_stopped_and_continued(server: RunningServer) -> None:
    pid = server.engine_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        assert server.until(lambda: server.http.get("/readyz").status_code == 503) < 20
        assert server.http.get("/livez").status_code == 200
        assert "silent" in server.http.get("/health").json()["error"]["message"]
    finally:
        os.kill(pid, signal.SIGCONT)
    server.until(lambda: server.http.get("/readyz").status_code == 200)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(server: RunningServer, stream: bool) -> None:
    body = b'{"prompt": "a b c", "max_tokens": 450, "n": 4, "stream": %s}' % (b"true" if stream else b"false")
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        server.until(lambda: server.figure("powerband_requests_running") == 4)
    until_empty(server)


def test_a_client_that_leaves_the_queue(server: RunningServer) -> None:
    server.post("/admin/pause")
    try:
        with socket.create_connection(server.url.removeprefix("http://").split(":")) as client:
            client.sendall(ASKED)
            server.until(lambda: server.figure("powerband_requests_waiting") == 1)
        until_empty(server)
        assert server.http.get("/readyz").status_code == 503
    finally:
        assert server.post("/admin/resume").json() == {"draining": False, "paused": False, "running_http_requests": 0}


def test_a_slow_reader_holds_up_nobody(server: RunningServer) -> None:
    # About 10 MB of answer, far more than all the buffers between here and there.
    body = (
        b'{"messages": [{"role": "user", "content": "a b c"}], "max_tokens": 450, "ignore_eos": true, "n": 16,'
        b' "stream": true, "logprobs": true, "top_logprobs": 20}'
    )
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        server.until(lambda: server.figure("powerband_requests_running") == 16)
        start_s = time.monotonic()
        assert server.post("/v1/completions", prompt="a b c", max_tokens=5).status_code == 200
        assert time.monotonic() - start_s < 15  # without a reader it would never end
        # The engine runs ahead of the reader and is done; the answer waits here, in token ids.
        until_empty(server, timeout_s=30)
        assert server.post("/admin/resume").json()["running_http_requests"] == 1
    server.until(lambda: server.post("/admin/resume").json()["running_http_requests"] == 0)


def test_many_aborts_return_every_block(server: RunningServer) -> None:
    def leave_early(tokens: int) -> None:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG) as response:
            for _, _ in zip(response.iter_lines(), range(tokens), strict=False):
                pass

    threads = [threading.Thread(target=leave_early, args=(1 + i % 13,)) for i in range(60)]
    files = Path(f"/proc/{server.process.pid}/fd")
    num_open = len(list(files.iterdir()))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until_empty(server)
    server.until(lambda: len(list(files.iterdir())) <= num_open)


def test_sigterm_lets_running_requests_end() -> None:
    with running_server() as server:
        with server.http.stream("POST", "/v1/completions", json=LONG) as response:
            lines = response.iter_lines()
            next(lines)
            httpx.post(f"{server.url}/admin/pause")  # so that it cannot end too early
            server.process.send_signal(signal.SIGTERM)
            server.until(lambda: "draining" in error_of(server.http, "/readyz"))
            refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"})
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "draining"
            httpx.post(f"{server.url}/admin/resume")
            assert "draining" in error_of(server.http, "/readyz")
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert server.process.wait(60) == 0


def test_sigterm_does_not_wait_for_ever() -> None:
    with running_server("model=long-steps", "drain_timeout_s=0") as server:
        with server.http.stream("POST", "/v1/completions", json=LONG) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        assert "The engine was stopped" in last
        assert server.process.wait(60) == 0


def test_ctrl_c_twice_ends_at_once() -> None:
    with (
        running_server("model=long-steps") as server,
        server.http.stream("POST", "/v1/completions", json=LONG) as response,
    ):
        next(response.iter_lines())
        server.process.send_signal(signal.SIGINT)
        server.until(lambda: "draining" in error_of(server.http, "/readyz"))
        start_s = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 130
        assert time.monotonic() - start_s < 20  # the stream takes 45 s


def test_a_killed_server_takes_its_engine_along() -> None:
    with running_server() as server:
        engine = server.engine_pid()
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        server.until(lambda: not os.path.exists(f"/proc/{engine}"))


def test_a_full_queue_refuses_before_the_first_byte() -> None:
    with running_server("max_num_seqs=1", "max_num_queued_reqs=2") as server:
        never = server.post("/v1/completions", prompt=["a", "b"], n=2)  # coming back later would not help
        assert never.status_code == 400
        assert never.json()["error"]["message"].startswith("All prompts, n times, are 4 choices; 3 can run")
        server.post("/admin/pause")
        clients = [socket.create_connection(server.url.removeprefix("http://").split(":")) for _ in range(3)]
        for client in clients:
            client.sendall(ASKED)
        server.until(lambda: server.figure("powerband_requests_waiting") == 3)
        for stream in (True, False):
            start_s = time.monotonic()
            refused = server.post("/v1/completions", prompt="a", stream=stream)
            assert time.monotonic() - start_s < 20  # the engine is paused: what waits there waits for ever
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "queue_full"
        assert (
            server.figure('powerband_requests_refused_total{engine="0",model_name="parrot",reason="queue_full"}') == 2
        )
        assert server.figure('vllm:request_success_total{engine="0",finished_reason="abort",model_name="parrot"}') == 0
        server.post("/admin/resume")
        for client in clients:
            assert client.recv(16).startswith(b"HTTP/1.1 200")
            client.close()


def test_sigterm_while_the_engine_starts() -> None:
    port = free_port()
    process = subprocess.Popen([sys.executable, str(SERVE_FAKE), str(port), "model=slow"], process_group=0)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
        server = RunningServer(f"http://127.0.0.1:{port}", process, http)
        server.until(lambda: "weights 100%" in error_of(http, "/startupz"))
        assert http.get("/livez").status_code == 200
        assert "starting" in error_of(http, "/readyz")
        refused = http.post("/v1/completions", json={"prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "starting")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def error_of(http: httpx.Client, path: str) -> str:
    try:
        return str(http.get(path).json().get("error", {}).get("message", ""))
    except httpx.TransportError:
        return ""


def test_a_port_in_use_is_said_before_anything_is_loaded() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        result = _serve(str(other.getsockname()[1]))
    assert result.returncode == 3
    assert "Cannot listen on 127.0.0.1 port" in result.stderr


def test_an_engine_that_cannot_start_ends_the_server_with_its_own_error() -> None:
    result = _serve(str(free_port()), "model=broken")
    assert result.returncode == 3
    assert "No folder 'broken'. Give a folder." in result.stderr


def _serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SERVE_FAKE), *arguments], capture_output=True, text=True, timeout=60)
