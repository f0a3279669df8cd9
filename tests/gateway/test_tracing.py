"""Traces and the access log: ids from client to replica, spans at a collector, lines for machines; never a text."""

from __future__ import annotations

import importlib.util
import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from gateways_for_tests import gateway_before, running_gateway, until
from requests_for_tests import finished

from powerband.errors import EnvironmentFault, UsageError
from powerband.gateway.observability.access_log import log_request
from powerband.gateway.observability.tracing import Tracing
from powerband.gateway.trace_context import continue_trace, forwarded_trace
from powerband.metrics.logging import JsonFormatter
from powerband.metrics.record import Outcome
from powerband.mock_server.behavior import Behavior

HAS_OTEL = (
    importlib.util.find_spec("opentelemetry") is not None and importlib.util.find_spec("opentelemetry.sdk") is not None
)
needs_otel = pytest.mark.skipif(not HAS_OTEL, reason="powerband[otel] is not installed")
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SENT = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "vendor=1"}


def test_a_clients_trace_goes_on_with_spans_of_our_own() -> None:
    trace = continue_trace(SENT)
    assert (trace.trace_id, trace.parent_id, trace.is_sampled) == (TRACE, SPAN, True)
    assert len({trace.span_id, trace.exchange_id, SPAN}) == 3
    assert trace.headers == {"traceparent": f"00-{TRACE}-{trace.exchange_id}-01", "tracestate": "vendor=1"}


def test_what_a_client_does_not_want_traced_is_not() -> None:
    assert not continue_trace({"traceparent": f"00-{TRACE}-{SPAN}-00"}).is_sampled
    assert not continue_trace({}, share=0.0).is_sampled


def test_without_tracing_the_clients_header_is_handed_on_as_it_is() -> None:
    trace = forwarded_trace(SENT)
    assert trace is not None
    assert trace.headers == SENT
    assert forwarded_trace({}) is None


@pytest.mark.parametrize(
    "header",
    [
        "",
        "00",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-x",
    ],
)
def test_what_is_no_context_begins_a_new_one(header: str) -> None:
    assert forwarded_trace({"traceparent": header}) is None
    assert continue_trace({"traceparent": header}).parent_id == ""


def test_a_long_state_is_left_out() -> None:
    trace = forwarded_trace({**SENT, "tracestate": "x" * 5000})
    assert trace is not None
    assert "tracestate" not in trace.headers


def test_the_log_has_ids_and_figures_in_json() -> None:
    line = logged(finished(outcome=Outcome.ERROR, error="upstream_failed", replicas=("r1", "r2"), cached_tokens=4))
    assert line["level"] == "warning"
    assert (line["request_id"], line["key"], line["replicas"]) == ("req_1", "anonymous", ["r1", "r2"])
    assert (line["prompt_tokens"], line["cached_tokens"], line["output_tokens"]) == (10, 4, 4)
    assert (line["ttft_s"], line["status"], line["error"]) == (0.2, 200, "upstream_failed")


def logged(request: Any) -> dict[str, Any]:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign] # keeps them
    logger = logging.getLogger("powerband.gateway.observability.access_log")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        log_request(request)
    finally:
        logger.removeHandler(handler)
    found: dict[str, Any] = json.loads(JsonFormatter().format(records[0]))
    return found


def test_a_gateway_writes_a_line_for_each_request_and_no_text(tmp_path: Path) -> None:
    with gateway_before(tmp_path, Behavior(), arguments=["--access-log", "--log-format", "json"]) as gateway:
        body = {"model": "scripted", "prompt": "a secret prompt", "max_tokens": 4}
        answer = gateway.http.post("/v1/completions", json=body, headers=SENT)
        log = tmp_path / "gateway.log"

        def lines() -> list[dict[str, Any]]:
            found = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
            return [line for line in found if "request_id" in line]

        until(lambda: bool(lines()))
        (line,) = lines()
        assert line["request_id"] == answer.headers["x-request-id"]
        assert line["trace_id"] == TRACE
        assert "secret" not in log.read_text()


class _Replica(BaseHTTPRequestHandler):
    """Answers whatever it is asked, and keeps the headers of what it is asked to generate."""

    seen: ClassVar[list[dict[str, str]]] = []

    def do_GET(self) -> None:
        self.answer({"status": "ok"})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.seen.append({name.lower(): value for name, value in self.headers.items()})
        self.answer({"choices": [{"text": "yes", "index": 0, "finish_reason": "stop"}]})

    def answer(self, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def test_a_replica_is_told_of_the_clients_trace(tmp_path: Path) -> None:
    replica = ThreadingHTTPServer(("127.0.0.1", 0), _Replica)
    thread = threading.Thread(target=replica.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        address = {"id": "r1", "url": f"http://127.0.0.1:{replica.server_port}", "model": "demo"}
        (tmp_path / "routes.yaml").write_text(json.dumps({"models": [{"name": "demo", "replicas": [address]}]}))
        with running_gateway(tmp_path, f"--routes={tmp_path / 'routes.yaml'}") as gateway:
            until(lambda: gateway.replica_states() == {"r1": "ready"})
            body = {"model": "demo", "prompt": "hello"}
            gateway.http.post("/v1/completions", json=body, headers=SENT).raise_for_status()
            gateway.http.post("/v1/completions", json=body).raise_for_status()
    finally:
        replica.shutdown()
        thread.join()
        replica.server_close()
    first, second = _Replica.seen
    assert {name: first[name] for name in SENT} == SENT
    assert "traceparent" not in second


@pytest.mark.skipif(HAS_OTEL, reason="powerband[otel] is installed")
def test_tracing_without_the_packages_says_what_to_install() -> None:
    with pytest.raises(EnvironmentFault, match=r"powerband\[otel\]"):
        Tracing("http://127.0.0.1:4318")


def test_a_collector_is_a_url() -> None:
    with pytest.raises(UsageError, match="Invalid URL of a collector"):
        Tracing("127.0.0.1:4318")


class Collector(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Any] = []


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        assert self.path == "/v1/traces"
        batch = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        for resource in batch.resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@needs_otel
def test_spans_reach_a_collector_under_the_clients(collector: Collector) -> None:
    tracing = Tracing(f"http://127.0.0.1:{collector.server_port}")
    over = finished(queue_s=0.1, cached_tokens=4)
    over.request.trace = continue_trace(SENT)
    tracing.note(over)
    unsampled = finished()
    unsampled.request.trace = continue_trace({}, share=0.0)
    tracing.note(unsampled)
    tracing.close()
    root, queue, replica = collector.spans
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
    assert (root.name, root.parent_span_id.hex(), root.span_id.hex()) == ("chat demo", SPAN, over.request.trace.span_id)
    assert queue.parent_span_id == replica.parent_span_id == root.span_id
    assert replica.span_id.hex() == over.request.trace.exchange_id
    assert (root.end_time_unix_nano - root.start_time_unix_nano) / 1e9 == pytest.approx(over.seconds, abs=1e-3)
    assert (queue.end_time_unix_nano - queue.start_time_unix_nano) / 1e9 == pytest.approx(0.1, abs=1e-3)
    told = {one.key: one.value for one in root.attributes}
    assert told["gen_ai.operation.name"].string_value == "chat"
    assert told["gen_ai.usage.input_tokens"].int_value == 10
    assert told["gen_ai.usage.cache_read.input_tokens"].int_value == 4


@needs_otel
def test_a_failure_is_an_error_of_its_span(collector: Collector) -> None:
    tracing = Tracing(f"http://127.0.0.1:{collector.server_port}")
    over = finished(outcome=Outcome.REFUSED, status=503, error="pool_full", tokens=0, replicas=())
    over.request.trace = continue_trace({})
    tracing.note(over)
    tracing.close()
    (root,) = collector.spans
    assert (root.parent_span_id, root.status.code, root.status.message) == (b"", 2, "pool_full")


@needs_otel
def test_a_collector_that_is_away_holds_nobody_up() -> None:
    tracing = Tracing("http://127.0.0.1:9")
    over = finished()
    over.request.trace = continue_trace({})
    began_s = time.monotonic()
    for _ in range(3000):
        tracing.note(over)
    assert time.monotonic() - began_s < 60
    tracing.close()


@needs_otel
def test_a_gateway_traces_what_goes_through_it(tmp_path: Path, collector: Collector) -> None:
    flags = [f"--otlp-endpoint=http://127.0.0.1:{collector.server_port}"]
    with gateway_before(tmp_path, Behavior(), arguments=flags) as gateway:
        body = {"model": "scripted", "prompt": "hello", "max_tokens": 4}
        gateway.http.post("/v1/completions", json=body, headers=SENT).raise_for_status()
    names = {span.name for span in collector.spans}  # sent at the latest when it ends
    assert "text_completion scripted" in names
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
