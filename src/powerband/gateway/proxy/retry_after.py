"""Retry-After of an answer (RFC 9110, section 10.2.3): seconds, or a date."""

from __future__ import annotations

import time
from collections.abc import Iterable
from email.utils import parsedate_to_datetime

MAX_RETRY_AFTER_S = 3600.0  # a replica that asks for more is asked again after so long


def retry_after_s(headers: Iterable[tuple[bytes, bytes]]) -> float | None:
    """Seconds from now, 0 to MAX_RETRY_AFTER_S; None: it is not said, or not in either form."""
    value = next((value for name, value in headers if name == b"retry-after"), b"").decode("latin-1").strip()
    if value.replace(".", "", 1).isdecimal() and value.isascii():  # some servers say fractions
        seconds = float(value)
    else:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)
