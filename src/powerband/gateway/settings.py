"""Settings of a gateway, declared as in spec/settings.py. The routes are separate, in gateway/routes.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from powerband.gateway.options import PoolOptions, RetentionOptions, Timeouts
from powerband.spec.settings import check_values, setting
from powerband.web.origins import parse_origins


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """Settings of one gateway. Raises UsageError naming the field when a value is wrong."""

    host: str = setting("127.0.0.1", "Address to listen on; beyond loopback keys are required", group="Gateway")
    port: int = setting(8080, "Port to listen on; 0: any free port", group="Gateway", minimum=0, maximum=65535)
    database: str | None = setting(
        None,
        "SQLite file with keys and usage; the routes are stored beside it; default: in the state directory",
        group="Gateway",
    )
    auth: Literal["open", "keys"] = setting(
        "open", "keys: every request needs an API key; open: only the admin API does", group="Gateway"
    )
    allowed_origins: str | None = setting(
        None,
        "Origins of web pages that may use the API, separated by commas, such as https://chat.example.com; *: any page",
        group="Gateway",
    )
    usage_retention_days: float = setting(
        90.0, "Days for which single requests stay in the database; daily sums are kept", group="Gateway", minimum=0
    )
    store_content: bool = setting(
        False,
        "Store prompts and outputs in the database; the Responses API has previous_response_id then",
        group="Gateway",
    )
    redact_content: bool = setting(
        True,
        "Redact recognized personal data in what --store-content stores; a conversation that had any cannot be "
        "continued by previous_response_id",
        group="Gateway",
    )
    content_retention_days: float = setting(
        7.0, "Days for which prompts and outputs are stored, with --store-content", group="Gateway", minimum=0
    )
    drain_timeout_s: float = setting(
        30.0, "Seconds for running requests to finish after SIGTERM", group="Gateway", minimum=0, maximum=3600
    )
    max_body_bytes: int = setting(4 << 20, "Maximum request body", group="Gateway", minimum=1024, maximum=256 << 20)
    default_output_tokens: int = setting(
        256,
        "Output tokens that limits and queue assume for a chat without max_tokens; "
        "a key's limits never cap its output below this",
        group="Gateway",
        minimum=1,
    )
    routing: Literal["prefix", "least-outstanding", "session", "weighted"] = setting(
        "prefix",
        "Which replica gets a request: the one with most of its prompt cached, unless it is overloaded (prefix); with "
        "the least outstanding work; the one that served its session; or by weight",
        group="Queue",
    )
    max_waiting_per_replica: int = setting(
        2,
        "Requests sent to a replica beyond those that it runs at once; all others queue here",
        group="Queue",
        minimum=0,
    )
    max_queued_requests: int = setting(
        4096, "Maximum queued requests; new ones are rejected (503)", group="Queue", minimum=1
    )
    max_queued_tokens: int = setting(
        16_000_000,
        "Maximum prompt and output tokens of queued requests; new ones are rejected (503)",
        group="Queue",
        minimum=1,
    )
    max_queue_wait_s: float = setting(
        60.0,
        "Maximum queueing time; a request that is expected to wait longer is rejected at once (503)",
        group="Queue",
        minimum=0.01,
        was="longest_wait_s",
    )
    default_deadline_s: float | None = setting(
        None,
        "Seconds to the first token for requests without 'deadline_s'; rejected (503) when it cannot be met",
        group="Queue",
        minimum=0.001,
    )
    probe_interval_s: float = setting(
        0.5,
        "Seconds between readiness probes of a replica",
        group="Failure",
        minimum=0.01,
        maximum=60,
        was="probe_every_s",
    )
    probe_timeout_s: float = setting(
        1.0,
        "Seconds after which a probe has failed; after two failures in a row a replica gets no requests",
        group="Failure",
        minimum=0.01,
        maximum=60,
    )
    retry_budget_ratio: float = setting(
        0.2,
        "Maximum retries in 10 s, relative to the active requests of a key; ten are always allowed",
        group="Failure",
        minimum=0,
        maximum=1,
        was="retry_share",
    )
    max_attempts: int = setting(
        3,
        "Replicas that may fail a request before its client gets the error",
        group="Failure",
        minimum=1,
        maximum=10,
        was="max_tries",
    )
    connect_timeout_s: float = setting(3.0, "Seconds to connect to a replica", group="Failure", minimum=0.01)
    first_byte_timeout_s: float = setting(
        60.0, "Seconds from a request to the first event of its stream", group="Failure", minimum=0.01
    )
    stream_idle_timeout_s: float = setting(
        30.0, "Seconds between two events of a stream", group="Failure", minimum=0.01, was="stall_timeout_s"
    )
    request_timeout_s: float = setting(3600.0, "Seconds for a whole response", group="Failure", minimum=0.01)
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "Minimum level of log lines", group="Gateway"
    )
    log_format: Literal["text", "json"] = setting("text", "Format of log lines on stderr", group="Gateway")
    access_log: bool = setting(
        False, "Log a line for each request: ids, tokens and times, never prompts or outputs", group="Gateway"
    )
    otlp_endpoint: str | None = setting(
        None,
        "Collector for traces (OTLP over HTTP, e.g. http://127.0.0.1:4318); needs powerband[otel]",
        group="Gateway",
    )
    trace_sample_ratio: float = setting(
        1.0,
        "Fraction of requests that are traced, among those that arrive without a trace",
        group="Gateway",
        minimum=0,
        maximum=1,
        was="trace_share",
    )

    def __post_init__(self) -> None:
        check_values(self)
        parse_origins(self.allowed_origins)

    @property
    def accounts(self) -> RetentionOptions:
        return RetentionOptions(
            usage_retention_days=self.usage_retention_days,
            store_content=self.store_content,
            redact_content=self.redact_content,
            content_retention_days=self.content_retention_days,
        )

    @property
    def pool(self) -> PoolOptions:
        return PoolOptions(
            routing=self.routing,
            max_waiting_per_replica=self.max_waiting_per_replica,
            max_queued_requests=self.max_queued_requests,
            max_queued_tokens=self.max_queued_tokens,
            max_queue_wait_s=self.max_queue_wait_s,
            default_deadline_s=self.default_deadline_s,
            retry_budget_ratio=self.retry_budget_ratio,
            probe_interval_s=self.probe_interval_s,
            probe_timeout_s=self.probe_timeout_s,
        )

    @property
    def stream_timeouts(self) -> Timeouts:
        return Timeouts(
            connect_s=self.connect_timeout_s,
            first_byte_s=self.first_byte_timeout_s,
            idle_s=self.stream_idle_timeout_s,
            total_s=self.request_timeout_s,
        )

    @property
    def whole_timeouts(self) -> Timeouts:
        """Timeouts of responses that are not streamed: their first byte comes only when everything is computed."""
        limit_s = self.request_timeout_s
        return Timeouts(connect_s=self.connect_timeout_s, first_byte_s=limit_s, idle_s=limit_s, total_s=limit_s)
