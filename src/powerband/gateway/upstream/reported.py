"""From an error that a replica reported to an exception: UpstreamFailure, after which another replica may succeed, or
InvalidUpstreamRequest.

status     about
401, 407   the gateway's key
402, 403   the key if the error says so, else the request: moderation, a model or an amount that is not allowed
404, 405   an endpoint or a model that the replica lacks
429, 503   the replica's capacity
4xx        the request
5xx        the replica, or the request: see `FailureKind.ERROR_RESPONSE`
"""

from __future__ import annotations

import re

from powerband.gateway.upstream.errors import InvalidUpstreamRequest, phrase, with_served_name
from powerband.gateway.upstream.failure import FailureKind, UpstreamFailure
from powerband.openai.errors import ReportedError, read_error

# Error codes of a Powerband replica that accepts no requests now: the request has not reached an engine.
_UNAVAILABLE_CODES = ("starting", "not_ready", "draining", "engine_unavailable")
_KEY_STATUSES = (401, 407)
_FORBIDDEN_STATUSES = (402, 403)
_MISSING_STATUSES = (404, 405, 410, 501)
_CAPACITY_STATUSES = (429, 503)
_ABOUT_CONNECTION = (408, 421, 425)
# Codes and types such as `invalid_api_key` and `authentication_error`. Messages are looser, and count for less.
_KEY_CODES = re.compile(r"api.?key|(invalid|expired|revoked).?key|authenticat|unauthori|credential", re.IGNORECASE)
_KEY_MESSAGES = re.compile(r"\bkeys?\b|" + _KEY_CODES.pattern, re.IGNORECASE)


def response_failure(
    status: int, complaint: ReportedError, *, retry_after_s: float | None, api_key: str, serves_others: bool
) -> UpstreamFailure | InvalidUpstreamRequest:
    """The exception for a response with an error status.

    api_key: the gateway's for the replica. serves_others: whether the replica completed a request in the last minute,
    and so accepts the key.
    """
    shown = f"HTTP {phrase(status)}" + (f": {complaint.message}" if complaint.message else ".")
    code = complaint.code or f"http_{status}"
    if status == 503 and code in _UNAVAILABLE_CODES:
        return UpstreamFailure(code, shown, FailureKind.UNAVAILABLE)
    if status in _CAPACITY_STATUSES and code != "engine_dead":
        return UpstreamFailure(code, shown, FailureKind.REJECTED, retry_after_s=retry_after_s)
    is_forbidden = status in _FORBIDDEN_STATUSES
    quotes_key = bool(api_key) and api_key in complaint.message
    if status in _KEY_STATUSES or (is_forbidden and (quotes_key or _is_about_key(status, complaint, serves_others))):
        # The replica's message is not shown, because it may quote the key.
        problem = f"The replica rejects the gateway's key (HTTP {phrase(status)})."
        return UpstreamFailure(f"http_{status}", problem, FailureKind.UNAUTHORIZED)
    if is_forbidden:
        return _forbidden(status, complaint)
    if status in _MISSING_STATUSES:
        return UpstreamFailure(code, f"The replica does not offer this: {shown}", FailureKind.UNSUPPORTED)
    if 400 <= status < 500 and status not in _ABOUT_CONNECTION:
        return InvalidUpstreamRequest(complaint, status)
    return UpstreamFailure(code, shown)


def reported_failure(error: bytes, model: str, served: str) -> UpstreamFailure | InvalidUpstreamRequest:
    """The exception for an error inside of a response with status 200, which shows that the key is accepted.

    model, served: the model's name at the replica, and the one that the client knows.
    """
    complaint = with_served_name(read_error(error), model, served)
    if complaint.status in _FORBIDDEN_STATUSES:
        return _forbidden(complaint.status, complaint)
    if complaint.is_about_request:
        return InvalidUpstreamRequest(complaint)
    kind = FailureKind.REJECTED if complaint.status in _CAPACITY_STATUSES else None
    return UpstreamFailure(complaint.code or "error", f"The replica reported an error: {complaint.message}", kind)


def _is_about_key(status: int, complaint: ReportedError, serves_others: bool) -> bool:
    """Whether an error with a status that may be about the key or about the request is about the key."""
    if _KEY_CODES.search(f"{complaint.code} {complaint.type}"):
        return True
    is_generic = complaint.message.strip(" .!").lower() in ("", phrase(status)[4:].lower())
    return not serves_others and (is_generic or _KEY_MESSAGES.search(complaint.message) is not None)


def _forbidden(status: int, complaint: ReportedError) -> UpstreamFailure:
    error = InvalidUpstreamRequest(complaint, status)
    return UpstreamFailure(complaint.code or f"http_{status}", str(error), FailureKind.FORBIDDEN, client_error=error)
