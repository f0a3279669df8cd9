"""The error event that ends a stream which failed, in the format of its API."""

from __future__ import annotations

import msgspec

from powerband.core.loop import error_info
from powerband.errors import PowerbandError
from powerband.gateway.request import Endpoint
from powerband.web.anthropic import anthropic_error
from powerband.web.errors import error_body


def error_event(endpoint: Endpoint, error: PowerbandError, sequence_number: int) -> bytes:
    """sequence_number: of the event, in OpenAI's Responses."""
    if endpoint == "messages":
        data = anthropic_error(error_info(error))
    else:
        found = error_body(error_info(error)).error
        values = {"type": "error", "sequence_number": sequence_number}
        values |= {"code": found.code, "message": found.message, "param": found.param}
        # OpenAI's servers send these fields once more within `error`, from which its clients raise an exception.
        data = msgspec.json.encode({**values, "error": found})
    return b"event: error\ndata: %b\n\n" % data
