"""Errors in which a replica rejects a request as invalid, and how the client sees them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from email.utils import parsedate_to_datetime
from http import HTTPStatus

from powerband.errors import PowerbandError
from powerband.openai.errors import ReportedError

MAX_RETRY_AFTER_S = 30 * 86400.0


class InvalidUpstreamRequest(PowerbandError):
    """A replica finds the request invalid; another replica would, too."""

    http_status = 400
    default_code = "invalid_request"

    def __init__(self, complaint: ReportedError, status: int = 400) -> None:
        super().__init__(
            complaint.message or f"The replica rejects the request: {phrase(status)}.",
            code=complaint.code,
            param=complaint.param,
        )
        self.http_status = status


def with_served_name(complaint: ReportedError, model: str, served: str) -> ReportedError:
    """Replace the model's name at the replica by its served name."""
    if model == served or not model:
        return complaint
    return replace(complaint, message=complaint.message.replace(model, served))


def phrase(status: int) -> str:
    """'413 Request Entity Too Large'."""
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def retry_after_s(headers: Iterable[tuple[bytes, bytes]]) -> float | None:
    """The Retry-After header (RFC 9110, section 10.2.3) in seconds from now, 0 to MAX_RETRY_AFTER_S; None: missing, or
    invalid.
    """
    value = next((value for name, value in headers if name == b"retry-after"), b"").decode("latin-1").strip()
    if value.replace(".", "", 1).isdecimal() and value.isascii():  # some servers send fractions
        seconds = float(value)
    else:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)
