"""Spans of requests, sent by OTLP to a collector, in OpenTelemetry's conventions for generative AI. Needs `[otel]`.

A request's spans are created when it completes, from the same record as metrics and usage; they contain no prompts or
outputs. A thread of the SDK sends them in batches, and drops what the collector does not accept.
"""

from __future__ import annotations

import logging
from typing import Any

from powerband.errors import UsageError
from powerband.extras import missing
from powerband.gateway.observability.slo import has_first_token
from powerband.gateway.request import CompletedRequest
from powerband.gateway.trace_context import new_span_id
from powerband.metrics.record import Outcome

logger = logging.getLogger(__name__)

SCOPE = "powerband.gateway"
_OPERATIONS = {"chat": "chat", "completions": "text_completion"}
_END_S = 2.0


class Tracing:
    """endpoint: OTLP over HTTP, e.g. http://127.0.0.1:4318. Its headers come from OTEL_EXPORTER_OTLP_HEADERS.

    Raises MissingPackage if the packages are missing, and UsageError for an invalid URL.
    """

    def __init__(self, endpoint: str, *, service: str = "powerband-gateway") -> None:
        if not endpoint.startswith(("http://", "https://")):
            raise UsageError(
                f"Invalid URL of a collector: {endpoint!r}.", hint="Like http://127.0.0.1:4318.", param="otlp_endpoint"
            )
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise missing("opentelemetry", "--otlp-endpoint") from None
        self._api = trace
        self._ids = _GivenIds()
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service}), id_generator=self._ids, shutdown_on_exit=False
        )
        url = f"{endpoint.rstrip('/')}/v1/traces"
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=_END_S)))
        self._tracer = self._provider.get_tracer(SCOPE)

    def note(self, finished: CompletedRequest) -> None:
        """A sink of the gateway. Requests that are not sampled leave nothing."""
        trace = finished.request.trace
        if trace is None or not trace.is_sampled:
            return
        request, record = finished.request, finished.record
        start_s = finished.ended_at - finished.seconds
        at_start_s = record.scheduled_s  # on the other clock
        operation = _OPERATIONS[request.endpoint]
        self._span(
            f"{operation} {request.model}",
            self._api.SpanKind.SERVER,
            (trace.trace_id, trace.parent_id, trace.span_id),
            (start_s, finished.ended_at),
            _attributes(finished),
            _failure(finished),
        )
        if finished.queue_s > 0:
            ids = trace.trace_id, trace.span_id, new_span_id()
            self._span("queue", self._api.SpanKind.INTERNAL, ids, (start_s, start_s + finished.queue_s))
        if finished.replicas:
            self._span(
                f"replica {finished.replicas[-1]}",
                self._api.SpanKind.CLIENT,
                (trace.trace_id, trace.span_id, trace.exchange_id),
                (start_s + max(record.sent_s - at_start_s, 0.0), finished.ended_at),
                {"powerband.replicas": list(finished.replicas), "powerband.resumed": finished.resumed},
            )

    def close(self) -> None:
        """Send waiting spans; takes at most a few seconds."""
        self._provider.shutdown()

    def _span(
        self,
        name: str,
        kind: Any,
        ids: tuple[str, str, str],
        times_s: tuple[float, float],
        attributes: dict[str, Any] | None = None,
        failure: str = "",
    ) -> None:
        """ids: of the trace, of the span above it ('' for none), and its own."""
        trace_id, parent_id, self._ids.span_id = ids
        self._ids.trace_id = trace_id
        api = self._api
        context = api.set_span_in_context(api.INVALID_SPAN)
        if parent_id:
            parent = api.SpanContext(int(trace_id, 16), int(parent_id, 16), True, api.TraceFlags(1))
            context = api.set_span_in_context(api.NonRecordingSpan(parent))
        start_ns, end_ns = (int(time_s * 1e9) for time_s in times_s)
        span = self._tracer.start_span(name, context, kind, attributes or {}, start_time=start_ns)
        if failure:
            span.set_status(api.StatusCode.ERROR, failure)
        span.end(end_time=max(end_ns, start_ns))


def _attributes(finished: CompletedRequest) -> dict[str, Any]:
    request, record = finished.request, finished.record
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": _OPERATIONS[request.endpoint],
        "gen_ai.provider.name": "powerband",
        "gen_ai.request.model": request.model,
        "gen_ai.response.model": request.model,
        "gen_ai.request.stream": request.stream,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "http.response.status_code": finished.status,
        "powerband.request_id": request.id,
        "powerband.key": request.tenant,
        "powerband.queue_s": finished.queue_s,
    }
    if finished.finish_reason:
        attributes["gen_ai.response.finish_reasons"] = [finished.finish_reason]
    if has_first_token(finished) and record.ttft_s is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = record.ttft_s
    if failure := _failure(finished):
        attributes["error.type"] = failure
    return attributes


def _failure(finished: CompletedRequest) -> str:
    """Its code, or ''."""
    outcome = finished.record.outcome
    return "" if outcome is Outcome.OK else finished.error or outcome.value


class _GivenIds:
    """The SDK asks it for ids; they were chosen before, because replicas already have them."""

    def __init__(self) -> None:
        self.trace_id = self.span_id = ""

    def generate_trace_id(self) -> int:
        return int(self.trace_id, 16)

    def generate_span_id(self) -> int:
        return int(self.span_id, 16)

    def is_trace_id_random(self) -> bool:
        return False
