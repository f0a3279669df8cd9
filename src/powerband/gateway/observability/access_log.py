"""One log line per completed request, as text or (`--log-format json`) as JSON. Never prompts, outputs or keys."""

from __future__ import annotations

import logging

from powerband.gateway.observability.slo import has_first_token
from powerband.gateway.request import CompletedRequest
from powerband.metrics.record import Outcome

logger = logging.getLogger(__name__)


def log_request(finished: CompletedRequest) -> None:
    """A sink of the gateway."""
    request, record = finished.request, finished.record
    fields = {
        "request_id": request.id,
        "key": request.tenant,
        "model": request.model,
        "endpoint": request.endpoint,
        "stream": request.stream,
        "status": finished.status,
        "outcome": record.outcome.value,
        "error": finished.error,
        "finish_reason": finished.finish_reason,
        "replicas": list(finished.replicas),
        "resumed": finished.resumed,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "output_tokens": record.output_tokens,
        "reasoning_tokens": finished.reasoning_tokens,
        "queue_s": _rounded(finished.queue_s),
        "ttft_s": _rounded(record.ttft_s if has_first_token(finished) else None),
        "tpot_s": _rounded(record.tpot_s if has_first_token(finished) else None),
        "seconds": _rounded(finished.seconds),
        "cost_usd": finished.cost_usd,
        "is_estimate": finished.is_estimate,
    }
    if request.trace is not None:
        fields["trace_id"] = request.trace.trace_id
    level = logging.INFO if record.outcome in (Outcome.OK, Outcome.ABORTED) else logging.WARNING
    logger.log(
        level,
        "%s %d %s %s: %d + %d tokens in %.3f s at %s",
        request.id,
        finished.status,
        finished.error or record.outcome.value,
        request.model,
        record.prompt_tokens,
        record.output_tokens,
        finished.seconds,
        ", ".join(finished.replicas) or "no replica",
        extra=fields,
    )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
