"""A client's request as every part of the gateway sees it, and what is known of it when it is over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from powerband.dispatch.request import ANONYMOUS, DispatchRequest
from powerband.gateway.trace_context import TraceContext
from powerband.metrics.record import RequestRecord

__all__ = ["ANONYMOUS", "CompletedRequest", "Endpoint", "GatewayRequest"]

Endpoint = Literal["chat", "completions", "tokenize", "detokenize"]


@dataclass(slots=True, kw_only=True)
class GatewayRequest(DispatchRequest):
    """One request to generate, from its arrival to its end. Times on time.monotonic().

    tenant: the key's id. prompt_tokens, output_tokens: likely numbers, estimated before any replica has seen the
    request, for the queue: from the size of the prompt, from max_tokens times n, and from usual answers of the model.
    max_prompt_tokens, max_output_tokens: what it can take, for limits; None: no more than that. is_open_ended: it names
    no limit of its own, so that its output ends where the context does. answers: that are computed.
    """

    id: str
    endpoint: Endpoint
    model: str  # the served name, aliases resolved
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    is_open_ended: bool = False
    answers: int = 1
    trace: TraceContext | None = None  # to hand on to replicas


@dataclass(slots=True, kw_only=True)
class CompletedRequest:
    """A request that is over, for usage, metrics, logs, traces and the watcher.

    record: times as the gateway saw them, on time.monotonic(); `scheduled_s` is the arrival, `sent_s` when a replica
    got it. seconds in the queue: queue_s. status: the HTTP status that the client got. error: its code, or ''.
    seconds: from the arrival to the end, whatever that was. cost_usd: what the key was charged. is_estimate: no replica
    counted all of its tokens.
    """

    request: GatewayRequest
    record: RequestRecord
    status: int
    ended_at: float  # time.time()
    error: str = ""
    replicas: tuple[str, ...] = ()  # ids, in the order in which they were tried
    seconds: float = 0.0
    queue_s: float = 0.0
    cost_usd: float = 0.0
    is_estimate: bool = False
    failed: tuple[tuple[str, str], ...] = ()  # tries that broke off: replica and code; not what a replica refused
    resumed: int = 0  # times that another replica went on in the middle of the stream
    finish_reason: str = ""
    sequence: int = field(default=0)  # numbers what is over, from 1, for those who read along
