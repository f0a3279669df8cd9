"""Requests that are over, as a gateway would tell of them."""

from __future__ import annotations

from powerband.gateway.request import CompletedRequest, Endpoint, GatewayRequest
from powerband.metrics.record import Outcome, RequestRecord


def finished(
    *,
    model: str = "demo",
    endpoint: Endpoint = "chat",
    arrival_s: float = 100.0,
    ttft_s: float = 0.2,
    tokens: int = 4,
    gap_s: float = 0.05,
    outcome: Outcome = Outcome.OK,
    status: int = 200,
    prompt_tokens: int = 10,
    cached_tokens: int = 0,
    queue_s: float = 0.0,
    seconds: float | None = None,
    error: str = "",
    replicas: tuple[str, ...] = ("r1",),
    resumed: int = 0,
    stream: bool = True,
    sequence: int = 0,
) -> CompletedRequest:
    """One that arrived at `arrival_s`, with tokens in chunks of one, `gap_s` apart."""
    times_s = tuple(arrival_s + ttft_s + gap_s * place for place in range(tokens))
    record = RequestRecord(
        scheduled_s=arrival_s,
        sent_s=arrival_s + queue_s + 0.001,
        chunk_times_s=times_s,
        chunk_tokens=(1,) * tokens,
        outcome=outcome,
        prompt_tokens=prompt_tokens,
        output_tokens=tokens,
        cached_tokens=cached_tokens,
    )
    taken_s = (times_s[-1] - arrival_s if times_s else queue_s) if seconds is None else seconds
    return CompletedRequest(
        request=GatewayRequest(id="req_1", endpoint=endpoint, model=model, arrival_s=arrival_s, stream=stream),
        record=record,
        status=status,
        ended_at=1_700_000_000.0 + arrival_s + taken_s,
        error=error,
        replicas=replicas,
        seconds=taken_s,
        queue_s=queue_s,
        resumed=resumed,
        sequence=sequence,
    )
