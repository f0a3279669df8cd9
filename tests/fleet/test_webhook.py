"""A webhook over loopback: its messages, its retries, and that it never blocks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from powerband.errors import UsageError
from powerband.fleet.monitor.incidents import Incident
from powerband.fleet.monitor.webhook import Webhook

INCIDENT = Incident(
    id="inc-1", kind="promise", subject="service", cause="load", what="Too much comes.", opened_at=1.0, seen_at=1.0
)


class Receiver(ThreadingHTTPServer):
    """Answers with `statuses`, the last one for ever; keeps the bodies."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.statuses = [200]
        self.bodies: list[dict[str, Any]] = []
        self.got = threading.Semaphore(0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook?room=1"


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.bodies.append({"path": self.path, **json.loads(body)})
        statuses = self.server.statuses
        self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
        self.end_headers()
        self.server.got.release()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_notifies_of_an_opened_incident(receiver: Receiver) -> None:
    webhook = Webhook(receiver.url, service="demo")
    webhook.notify("opened", INCIDENT)
    assert receiver.got.acquire(timeout=10)
    webhook.close()
    (body,) = receiver.bodies
    assert body["path"] == "/hook?room=1"
    assert body["event"] == "opened"
    assert body["text"] == "Incident inc-1 at demo opened: Too much comes."
    assert body["incident"]["cause"] == "load"


def test_retries_until_the_webhook_confirms(receiver: Receiver) -> None:
    receiver.statuses = [500, 302, 200]
    pauses: list[float] = []
    webhook = Webhook(receiver.url, sleep=pauses.append)
    webhook.notify("closed", INCIDENT)
    for _ in range(3):
        assert receiver.got.acquire(timeout=10)
    webhook.close()
    assert [body["event"] for body in receiver.bodies] == ["closed"] * 3
    assert pauses == [1.0, 3.0]


def test_notify_never_blocks() -> None:
    held = threading.Event()
    webhook = Webhook("http://127.0.0.1:9/", sleep=lambda _: held.wait(10))  # nobody listens there
    start_s = time.monotonic()
    for _ in range(1000):
        webhook.notify("opened", INCIDENT)
    assert time.monotonic() - start_s < 8.0
    held.set()
    webhook.close()


@pytest.mark.parametrize(
    "url", ["ftp://example.org", "example.org/hook", "file:///etc/passwd", "http://example.org:port/"]
)
def test_refuses_an_invalid_url(url: str) -> None:
    with pytest.raises(UsageError, match="Invalid webhook URL"):
        Webhook(url)
