"""Requests that a gateway hands to the controller."""

from __future__ import annotations

import msgspec

from powerband.gateway.request import CompletedRequest, GatewayRequest
from powerband.metrics.record import RequestRecord


def test_a_completed_request_is_read_as_it_was_written() -> None:
    request = GatewayRequest(id="r", endpoint="chat", model="m")
    completed = CompletedRequest(
        request=request, record=RequestRecord(scheduled_s=1.0, sent_s=2.0), status=200, ended_at=3.0
    )
    # JSON has no infinity: it would come back as null, and the controller would read nothing at all.
    assert msgspec.json.decode(msgspec.json.encode(completed), type=CompletedRequest) == completed
