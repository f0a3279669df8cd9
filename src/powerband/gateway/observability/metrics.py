"""A gateway's /metrics: under Powerband's names, and under OpenTelemetry's names for generative AI.

Label sets are closed: served names of models, ids of present replicas, and words from fixed lists. Nothing that a
client sends can add a time series.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from powerband.dispatch.backend import BACKEND_STATES
from powerband.gateway.observability.slo import has_first_token, slo_violations
from powerband.gateway.request import CompletedRequest
from powerband.gateway.routes import ModelRoute
from powerband.gateway.snapshot import PoolSnapshot
from powerband.metrics.prometheus import LATENCY_BUCKETS_S, Histogram
from powerband.metrics.record import Outcome

OTHER = "other"
_MAX_GONE = 16
ENDPOINTS = ("chat", "completions")
STATUSES = (200, 400, 401, 403, 404, 405, 408, 413, 415, 422, 429, 499, 500, 502, 503, 504)
OUTCOMES = tuple(outcome.value for outcome in Outcome)
# Codes of errors that a client may get.
KEY_REASONS = ("missing_api_key", "invalid_api_key", "revoked_api_key", "expired_api_key", "scope_missing")
REFUSED_REASONS = (
    *("pool_full", "deadline_infeasible", "queue_timeout", "no_replica", "replicas_busy", "draining", "not_ready"),
    *("requests_limit", "tokens_limit", "concurrency_limit", "spend_limit", "model_not_allowed"),
    *KEY_REASONS,
    *("host_not_allowed", "origin_not_allowed", "not_found", "model_not_found", "invalid_json", "invalid_request"),
    *("unknown_parameter", "unsupported_parameter", "context_length_exceeded", "request_too_large", "request_timeout"),
    *("unsupported_media_type", "unsupported_encoding", "store_unavailable", OTHER),
)

_HISTOGRAMS = {
    "ttft_seconds": "Arrival to first output token, of streams",
    "tpot_seconds": "Mean time per output token after the first, of streams",
    "stall_seconds": "Largest gap within a response",
    "e2e_seconds": "Arrival to last output token",
    "queue_seconds": "Time in the queue",
    "overhead_seconds": "Arrival to sent, without the queue: the gateway's own work, of requests sent once",
}
_COUNTERS = {
    "retries": "Requests sent to another replica before their first byte",
    "failovers": "Streams that another replica resumed",
    "truncated": "Streams that ended with an error event",
}
_OTEL_SECONDS = tuple(round(0.01 * 2**k, 2) for k in range(14))  # 0.01 … 81.92
_OTEL_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_OTEL_TPOT = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_OTEL_TOKENS = tuple(float(4**k) for k in range(14))  # 1 … 67,108,864
# Semantic conventions for generative AI (status: development), as Prometheus writes them: dots become underscores,
# units come after.
_OTEL = {
    "gen_ai_server_request_duration_seconds": ("Arrival to the end of the response", _OTEL_SECONDS),
    "gen_ai_server_time_to_first_token_seconds": ("Arrival to first output token, of successful requests", _OTEL_TTFT),
    "gen_ai_server_time_per_output_token_seconds": ("Per output token after the first, if successful", _OTEL_TPOT),
    "gen_ai_client_operation_duration_seconds": ("Sent to a replica until the end of its response", _OTEL_SECONDS),
    "gen_ai_client_token_usage": ("Input and output tokens of a request", _OTEL_TOKENS),
}
# gen_ai.operation.name; others are named as their endpoint.
_OPERATIONS = {"chat": "chat", "completions": "text_completion", "responses": "chat", "messages": "chat"}
PROVIDER = "powerband"

_Labels = tuple[str, ...]
_At = TypeVar("_At", bound=tuple[str, ...])
_REQUEST = ("model_name", "endpoint", "status", "outcome")
_REPLICA = ("model_name", "replica", "outcome")


@dataclass(frozen=True, slots=True, kw_only=True)
class GaugeSnapshot:
    """Gauges at a scrape. in_flight: requests. ledger_rows: of the usage log."""

    pools: tuple[PoolSnapshot, ...] = ()
    in_flight: int = 0
    ledger_rows_buffered: int = 0
    ledger_rows_lost: int = 0
    ledger_failing_s: float = 0.0


class _OneFamily(CollectorRegistry):
    """A registry of one metric family: prometheus_client only renders registries."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        yield self._family


class GatewayMetrics(Collector):
    """Updated by the gateway's event loop when requests end. address, port: where clients reach the gateway."""

    def __init__(self, *, address: str = "127.0.0.1", port: int = 8080) -> None:
        self._server = {"server_address": address, "server_port": str(port)}
        self._routes: dict[str, ModelRoute] = {}
        self._requests: Counter[_Labels] = Counter()
        self._by_replica: Counter[_Labels] = Counter()
        self._tokens: Counter[_Labels] = Counter()
        self._counts: Counter[_Labels] = Counter()
        self._verdicts: Counter[_Labels] = Counter()
        self._refused = dict.fromkeys(REFUSED_REASONS, 0)
        self._histograms: dict[_Labels, Histogram] = {}
        self._otel: dict[str, dict[_Labels, Histogram]] = {name: {} for name in _OTEL}
        self._moment = GaugeSnapshot()

    def serve(self, models: Iterable[ModelRoute]) -> None:
        """Set the served models. The last `_MAX_GONE` removed ones keep their series."""
        served = {model.name: model for model in models}
        gone = [name for name in self._routes if name not in served]
        for name in gone[: max(0, len(gone) - _MAX_GONE)]:
            self._forget(name)
        self._routes = {name: self._routes[name] for name in gone[-_MAX_GONE:]} | served
        for name in self._routes:
            for figure in _HISTOGRAMS:
                self._histograms.setdefault((name, figure), Histogram(LATENCY_BUCKETS_S))
            for figure in _COUNTERS:
                self._counts[name, figure] += 0
            for kind in ("prompt", "cached", "output"):
                self._tokens[name, kind] += 0
            for kept in ("true", "false"):
                self._verdicts[name, kept] += 0
            self._requests[name, "chat", "200", Outcome.OK.value] += 0

    def _forget(self, name: str) -> None:
        for kept in (self._requests, self._by_replica, self._tokens, self._counts, self._verdicts, self._histograms):
            for labels in [labels for labels in kept if labels[0] == name]:
                del kept[labels]
        for of_family in self._otel.values():
            for labels in [labels for labels in of_family if labels[1] == name]:
                del of_family[labels]

    def observe(self, finished: CompletedRequest) -> None:
        """Count a completed request. One for an unknown model counts only as refused."""
        record, request = finished.record, finished.request
        if record.outcome is Outcome.REFUSED:
            self.observe_rejection(finished.error)
        if request.model not in self._routes:
            return
        name, status = request.model, str(finished.status) if finished.status in STATUSES else OTHER
        self._requests[name, request.endpoint, status, record.outcome.value] += 1
        for kind, tokens in (
            ("prompt", record.prompt_tokens),
            ("cached", record.cached_tokens),
            ("output", record.output_tokens),
        ):
            self._tokens[name, kind] += tokens
        self._counts[name, "failovers"] += finished.resumed
        self._counts[name, "retries"] += max(len(finished.replicas) - 1 - finished.resumed, 0)
        self._counts[name, "truncated"] += finished.status == 200 and record.outcome in (
            Outcome.ERROR,
            Outcome.TIMED_OUT,
        )
        if finished.replicas:
            self._by_replica[name, finished.replicas[-1], record.outcome.value] += 1
        slo = self._routes[name].slo
        if slo is not None and (missed := slo_violations(finished, slo)) is not None:
            self._verdicts[name, "false" if missed else "true"] += 1
        self._observe_times(finished)
        self._observe_otel(finished, status)

    def observe_rejection(self, code: str) -> None:
        """Count a refused request, which may not have been parsed; `code` is the error's."""
        self._refused[code if code in self._refused else OTHER] += 1

    def render(self, snapshot: GaugeSnapshot) -> bytes:
        """The text that /metrics answers (content type: prometheus_client.CONTENT_TYPE_LATEST)."""
        return b"".join(self.parts(snapshot))

    def parts(self, snapshot: GaugeSnapshot) -> Iterator[bytes]:
        """`render`, one family at a time: all of them take 10 ms per model."""
        self._moment = snapshot
        present = {(pool.model, replica.id) for pool in snapshot.pools for replica in pool.replicas}
        for labels in [labels for labels in self._by_replica if labels[:2] not in present]:
            del self._by_replica[labels]
        for family in self.collect():
            yield generate_latest(_OneFamily(family))

    def collect(self) -> Iterator[Metric]:
        yield from self._counter_families()
        yield from self._gauge_families()
        for figure, what in _HISTOGRAMS.items():
            family = HistogramMetricFamily(f"powerband_gateway_{figure}", what, labels=["model_name"])
            for (name, kind), histogram in self._histograms.items():
                if kind == figure:
                    family.add_metric([name], histogram.cumulative(), histogram.sum)
            yield family
        yield from self._otel_families()

    def _observe_times(self, finished: CompletedRequest) -> None:
        record, name = finished.record, finished.request.model
        is_seen = has_first_token(finished)
        values = {
            "ttft_seconds": record.ttft_s if is_seen else None,
            "tpot_seconds": record.tpot_s if is_seen else None,
            "stall_seconds": record.stall_s if is_seen else None,
            "e2e_seconds": (record.e2e_s if is_seen else finished.seconds) if record.outcome is Outcome.OK else None,
            "queue_seconds": finished.queue_s if finished.replicas else None,
            "overhead_seconds": None,
        }
        if len(finished.replicas) == 1:
            values["overhead_seconds"] = max(record.sent_s - record.scheduled_s - finished.queue_s, 0.0)
        for figure, value in values.items():
            if value is not None:
                self._histograms[name, figure].observe(value)

    def _observe_otel(self, finished: CompletedRequest, status: str) -> None:
        record, request = finished.record, finished.request
        is_ok = record.outcome is Outcome.OK
        # An attribute that is absent is an empty label to Prometheus.
        error = "" if is_ok else "timeout" if record.outcome is Outcome.TIMED_OUT else status
        labels = _OPERATIONS.get(request.endpoint, request.endpoint), request.model, error

        def observe(name: str, value: float | None, *more: str) -> None:
            if value is not None:
                at = (*labels, *more)
                kept = self._otel[name]
                if at not in kept:
                    kept[at] = Histogram(_OTEL[name][1])
                kept[at].observe(value)

        observe("gen_ai_server_request_duration_seconds", finished.seconds)
        if finished.replicas:
            sent_after_s = record.sent_s - record.scheduled_s
            observe("gen_ai_client_operation_duration_seconds", max(finished.seconds - sent_after_s, 0.0))
        if is_ok and has_first_token(finished):
            observe("gen_ai_server_time_to_first_token_seconds", record.ttft_s)
            observe("gen_ai_server_time_per_output_token_seconds", record.tpot_s)
        if record.prompt_tokens:
            observe("gen_ai_client_token_usage", record.prompt_tokens, "input")
            observe("gen_ai_client_token_usage", record.output_tokens, "output")

    def _counter_families(self) -> Iterator[Metric]:
        yield _counters("requests", "Completed requests, by HTTP status and outcome", _REQUEST, self._requests)
        what = "Tokens of requests: prompt, cached (part of the prompt) and output"
        yield _counters("tokens", what, ("model_name", "kind"), self._tokens)
        for figure, what in _COUNTERS.items():
            counted = {(name,): count for (name, kind), count in self._counts.items() if kind == figure}
            yield _counters(figure, what, ("model_name",), counted)
        yield _counters("slo_requests", "Requests, by whether they met the SLO", ("model_name", "kept"), self._verdicts)
        refused = {(reason,): count for reason, count in self._refused.items()}
        yield _counters("refused", "Refused requests, by the error's code", ("reason",), refused)
        keys = {(reason,): self._refused[reason] for reason in KEY_REASONS}
        yield _counters(
            "keys_rejected", "Requests with a missing or invalid key, by the error's code", ("reason",), keys
        )
        yield _counters("replica_requests", "Requests, by their last replica", _REPLICA, self._by_replica)
        lost = {(): self._moment.ledger_rows_lost}
        yield _counters("ledger_rows_lost", "Usage rows that could not be written", (), lost)

    def _gauge_families(self) -> Iterator[Metric]:
        snapshot, model = self._moment, ("model_name",)
        yield _gauges("in_flight", "Requests in flight", (), {(): snapshot.in_flight})
        what = "Usage rows that wait to be written"
        yield _gauges("ledger_rows_buffered", what, (), {(): snapshot.ledger_rows_buffered})
        what = "Seconds since the database cannot be written; 0: it can"
        yield _gauges("ledger_failing_seconds", what, (), {(): snapshot.ledger_failing_s})
        pools = {(pool.model,): pool for pool in snapshot.pools}
        yield _gauges("queued", "Queued requests", model, {at: p.queued for at, p in pools.items()})
        tokens = {at: p.queued_tokens for at, p in pools.items()}
        yield _gauges("queued_tokens", "Maximum tokens of the queued requests", model, tokens)
        waits = {at: p.predicted_wait_s for at, p in pools.items()}
        yield _gauges("predicted_wait_seconds", "Predicted queueing time of a request that arrives now", model, waits)
        routes = {(name,): route for name, route in self._routes.items()}
        rates = {at: route.rate for at, route in routes.items() if route.rate is not None}
        yield _gauges("promised_rate", "Requests per second that the plan promises", model, rates)
        shares = {at: route.slo.attainment for at, route in routes.items() if route.slo is not None}
        yield _gauges("promised_attainment", "Fraction of requests that must meet the SLO", model, shares)
        limits = {
            (name, figure): limit
            for name, route in self._routes.items()
            if route.slo is not None
            for figure, limit in route.slo.limits.items()
        }
        yield _gauges("slo_limit_seconds", "Limit of each latency objective", ("model_name", "figure"), limits)
        replicas = {(pool.model, one.id): one for pool in snapshot.pools for one in pool.replicas}
        states = {(*at, state): float(one.state == state) for at, one in replicas.items() for state in BACKEND_STATES}
        yield _gauges("replica_state", "1 for the state of a replica, 0 for others", (*_REPLICA[:2], "state"), states)
        for field, what in (
            ("inflight", "Requests in flight at a replica"),
            ("running", "Running requests, as the replica reports"),
            ("waiting", "Waiting requests, as the replica reports"),
            ("silent_s", "Seconds since the last byte of its requests in flight; 0 without any"),
        ):
            values = {at: float(getattr(one, field)) for at, one in replicas.items()}
            yield _gauges(f"replica_{field.replace('silent_s', 'silent_seconds')}", what, _REPLICA[:2], values)

    def _otel_families(self) -> Iterator[Metric]:
        for name, (what, _) in _OTEL.items():
            more = ["gen_ai_token_type"] if name.endswith("token_usage") else []
            labels = ["gen_ai_operation_name", "gen_ai_request_model", "error_type", *more]
            constant = {"gen_ai_provider_name": PROVIDER, **self._server}
            family = HistogramMetricFamily(name, what, labels=[*labels, "gen_ai_response_model", *constant])
            for at, histogram in self._otel[name].items():
                values = [*at, at[1], *constant.values()]
                family.add_metric(values, histogram.cumulative(), histogram.sum)
            yield family


def _counters(name: str, what: str, labels: tuple[str, ...], values: Mapping[_At, float]) -> Metric:
    family = CounterMetricFamily(f"powerband_gateway_{name}", what, labels=labels)
    for at, value in values.items():
        family.add_metric(at, value)
    return family


def _gauges(name: str, what: str, labels: tuple[str, ...], values: Mapping[_At, float]) -> Metric:
    family = GaugeMetricFamily(f"powerband_gateway_{name}", what, labels=labels)
    for at, value in values.items():
        family.add_metric(at, value)
    return family
