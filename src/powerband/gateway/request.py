"""A client's request as all parts of the gateway see it, and the record of a completed request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from powerband.dispatch.request import ANONYMOUS, DispatchRequest
from powerband.gateway.trace_context import TraceContext
from powerband.metrics.record import RequestRecord

__all__ = ["ANONYMOUS", "CompletedRequest", "Endpoint", "GatewayRequest"]

# fmt: off
Endpoint = Literal[
    "chat", "completions", "tokenize", "detokenize", "count_tokens", "input_tokens",
    # Passed through to engines that offer them:
    "responses", "messages", "embeddings", "rerank", "score", "pooling", "classify",
]
# fmt: on


@dataclass(slots=True, kw_only=True)
class GatewayRequest(DispatchRequest):
    """One client request, from its arrival to its end. Times on time.monotonic().

    tenant is the key's id. prompt_tokens and output_tokens are estimates for the queue, made before a replica has seen
    the request: from the size of the prompt, max_tokens times n, and the model's mean output.
    """

    id: str
    endpoint: Endpoint
    model: str  # the served name, aliases resolved
    max_prompt_tokens: int | None = None  # upper bound, for limits; None: prompt_tokens
    max_output_tokens: int | None = None  # upper bound, for limits; None: output_tokens
    is_open_ended: bool = False  # no max_tokens: the output ends with the context
    num_sequences: int = 1  # to generate: n or best_of of each prompt
    adapter: str = ""  # the model is a LoRA adapter of this name at the replicas
    trace: TraceContext | None = None  # to send to replicas


@dataclass(slots=True, kw_only=True)
class CompletedRequest:
    """For usage, metrics, logs, traces and the monitor."""

    request: GatewayRequest
    record: RequestRecord  # on time.monotonic(): `scheduled_s` is the arrival, `sent_s` when it was sent to a replica
    status: int  # HTTP status that the client got
    ended_at: float  # time.time()
    error: str = ""  # code
    replicas: tuple[str, ...] = ()  # ids, in the order of the attempts
    seconds: float = 0.0  # from the arrival to the end, however it ended
    queue_s: float = 0.0
    cost_usd: float = 0.0  # charged to the key
    is_estimate: bool = False  # no replica counted all of its tokens
    failed: tuple[tuple[str, str], ...] = ()  # failed attempts: replica and error code; rejections (429, 503) excluded
    resumed: int = 0  # how often another replica resumed the stream
    finish_reason: str = ""
    reasoning_tokens: int | None = None  # of the output; None: the replica does not count them
    sequence: int = field(default=0)  # of the completed request, from 1, for /admin/records
