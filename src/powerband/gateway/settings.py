"""Everything that shapes a gateway, in the manner of spec/settings.py. What routes hold is in gateway/routes.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from powerband.gateway.options import PoolOptions, RetentionOptions, Timeouts
from powerband.spec.settings import check_values, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """Settings of one gateway. Raises UsageError naming the field when a value is wrong."""

    host: str = setting("127.0.0.1", "Address to listen on; beyond loopback keys are needed", group="Gateway")
    port: int = setting(8080, "Port to listen on; 0: any free one", group="Gateway", minimum=0, maximum=65535)
    database: str | None = setting(
        None, "File of keys and usage; routes are kept beside it; default: in the state folder", group="Gateway"
    )
    auth: Literal["open", "keys"] = setting(
        "open", "'keys': every request brings a key; 'open': only administration does", group="Gateway"
    )
    usage_retention_days: float = setting(
        90.0, "How long single requests are kept in the database; daily sums stay", group="Gateway", minimum=0
    )
    store_content: bool = setting(
        False, "Keep prompts and outputs in the database, with personal data of known forms taken out", group="Gateway"
    )
    content_retention_days: float = setting(
        7.0, "How long prompts and outputs are kept, where they are kept", group="Gateway", minimum=0
    )
    drain_timeout_s: float = setting(
        30.0, "Seconds that running requests may take to end after SIGTERM", group="Gateway", minimum=0, maximum=3600
    )
    max_body_bytes: int = setting(4 << 20, "Largest request body", group="Gateway", minimum=1024, maximum=256 << 20)
    default_output_tokens: int = setting(
        256,
        "Output tokens counted on for a chat that names no limit; the least that a key's limits leave it",
        group="Gateway",
        minimum=1,
    )
    routing: Literal["prefix", "least-outstanding", "session", "weighted"] = setting(
        "prefix",
        "Which replica with a free place gets a request: the one with most of its prompt in the cache, as far as load "
        "allows; with the least work left; the one that has its session; by weight",
        group="Queue",
    )
    max_waiting_per_replica: int = setting(
        2, "Requests that a replica gets beyond what it computes at once; others wait here", group="Queue", minimum=0
    )
    max_queued_requests: int = setting(
        4096, "Waiting requests beyond which new ones are refused (503)", group="Queue", minimum=1
    )
    max_queued_tokens: int = setting(
        16_000_000,
        "Tokens that waiting requests may take, beyond which new ones are refused (503)",
        group="Queue",
        minimum=1,
    )
    longest_wait_s: float = setting(
        60.0,
        "Nobody waits longer for a replica; refused at once (503) when it would be more",
        group="Queue",
        minimum=0.01,
    )
    default_deadline_s: float | None = setting(
        None,
        "Seconds to the first token for requests without 'deadline_s': refused (503) when they cannot be kept",
        group="Queue",
        minimum=0.001,
    )
    probe_every_s: float = setting(
        0.5, "How often a replica is asked whether it is ready", group="Failure", minimum=0.01, maximum=60
    )
    probe_timeout_s: float = setting(
        1.0, "By when it has to answer; two failures in a row take it out", group="Failure", minimum=0.01, maximum=60
    )
    retry_share: float = setting(
        0.2,
        "Second attempts within 10 s, as a share of a key's live requests; ten in any case",
        group="Failure",
        minimum=0,
        maximum=1,
    )
    max_tries: int = setting(
        3, "Replicas that may fail with a request before its client hears of it", group="Failure", minimum=1, maximum=10
    )
    connect_timeout_s: float = setting(3.0, "For a connection to a replica", group="Failure", minimum=0.01)
    first_byte_timeout_s: float = setting(
        60.0, "From sending to the first byte of a streamed answer", group="Failure", minimum=0.01
    )
    stall_timeout_s: float = setting(30.0, "Between two pieces of a streamed answer", group="Failure", minimum=0.01)
    request_timeout_s: float = setting(3600.0, "For a whole answer", group="Failure", minimum=0.01)
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "What is logged", group="Gateway")
    log_format: Literal["text", "json"] = setting("text", "Form of log lines on stderr", group="Gateway")
    access_log: bool = setting(False, "A line for each request: ids, tokens, times; never texts", group="Gateway")
    otlp_endpoint: str | None = setting(
        None, "Collector of traces (OTLP over HTTP, like http://127.0.0.1:4318); needs powerband[otel]", group="Gateway"
    )
    trace_share: float = setting(
        1.0, "Of requests that come without a trace, the share that is traced", group="Gateway", minimum=0, maximum=1
    )

    def __post_init__(self) -> None:
        check_values(self)

    @property
    def accounts(self) -> RetentionOptions:
        return RetentionOptions(
            usage_retention_days=self.usage_retention_days,
            store_content=self.store_content,
            content_retention_days=self.content_retention_days,
        )

    @property
    def pool(self) -> PoolOptions:
        return PoolOptions(
            routing=self.routing,
            max_waiting_per_replica=self.max_waiting_per_replica,
            max_queued_requests=self.max_queued_requests,
            max_queued_tokens=self.max_queued_tokens,
            max_queue_wait_s=self.longest_wait_s,
            default_deadline_s=self.default_deadline_s,
            retry_budget_ratio=self.retry_share,
            probe_interval_s=self.probe_every_s,
            probe_timeout_s=self.probe_timeout_s,
        )

    @property
    def stream_timeouts(self) -> Timeouts:
        return Timeouts(
            connect_s=self.connect_timeout_s,
            first_byte_s=self.first_byte_timeout_s,
            between_s=self.stall_timeout_s,
            whole_s=self.request_timeout_s,
        )

    @property
    def whole_timeouts(self) -> Timeouts:
        """Of answers that come at once, when all is done."""
        limit_s = self.request_timeout_s
        return Timeouts(connect_s=self.connect_timeout_s, first_byte_s=limit_s, between_s=limit_s, whole_s=limit_s)
