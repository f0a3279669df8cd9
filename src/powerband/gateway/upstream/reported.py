"""Errors that replicas report inside of a response with status 200."""

from __future__ import annotations

from powerband.gateway.upstream.errors import InvalidUpstreamRequest, with_served_name
from powerband.gateway.upstream.failure import UpstreamFailure
from powerband.openai.errors import read_error


def reported_failure(error: bytes, model: str, served: str) -> Exception:
    """The exception for an error: UpstreamFailure (another replica may succeed), or InvalidUpstreamRequest.

    model, served: the model's name at the replica, and the one that the client knows.
    """
    complaint = with_served_name(read_error(error), model, served)
    if complaint.is_about_request:
        return InvalidUpstreamRequest(complaint)
    return UpstreamFailure(complaint.code or "error", f"The replica reported an error: {complaint.message}")
