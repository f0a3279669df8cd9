"""Which of the fields of our requests a server accepts. Strict servers, OpenAI's own among them, reject those that they
do not know: `ignore_eos`, `continuous_usage_stats`, and `max_tokens` for reasoning models.

A short request is sent with all fields, and again without those that the server rejects, until it is answered. What
cannot be measured without them is said.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

import msgspec

from powerband.bench.client.http import post
from powerband.bench.client.messages import RequestMessage, SegmentMessage, ServerAddress
from powerband.bench.client.prompts import ConversationPrompts, PromptMaker
from powerband.http_client.request import Response
from powerband.openai.errors import read_error

# In the order in which they are left out when an error names none of them, and what is lost without each.
LOST: Mapping[str, str] = {
    "continuous_usage_stats": "chunks do not report their tokens, so they are counted from the usage at the end",
    "ignore_eos": "outputs end where the model ends them, and may be shorter than asked for",
    "temperature": "outputs are sampled at the server's own temperature",
    "stream_options": "streams report no usage, so chunks are counted as tokens",
    "max_tokens": "max_completion_tokens is sent instead",
}
_REJECTED = (400, 422)


async def find_accepted_fields(target: ServerAddress) -> ServerAddress:
    """The target without the fields that it rejects. It is unchanged if no request is answered. Raises OSError."""
    found = target
    for _ in range(len(LOST) + 1):
        planned = RequestMessage(0, (SegmentMessage(f"fields {time.time_ns()}", 4),), 1, 0, 0.0)
        page = await post(
            found, found.path, msgspec.json.decode(ConversationPrompts(found, PromptMaker()).body(planned))
        )
        if page.status not in _REJECTED:
            return found if page.status == 200 else target
        left = [name for name in LOST if name not in (*found.rejected_fields, *found.extra) and _is_sent(name, found)]
        if not left:
            return target
        name = _named(page, left)
        if name is None:
            if found.rejected_fields:  # the error is about something else
                return target
            name = left[0]
        found = msgspec.structs.replace(found, rejected_fields=(*found.rejected_fields, name))
    return target


def rejected_text(target: ServerAddress) -> str:
    """What is lost by the fields that the server rejects; '' if it accepts all."""
    return "; ".join(f"the server rejects {name}: {LOST[name]}" for name in target.rejected_fields)


def _is_sent(name: str, target: ServerAddress) -> bool:
    if name == "ignore_eos":
        return target.ignore_eos
    if name == "continuous_usage_stats":
        return "stream_options" not in target.rejected_fields
    return name != "max_tokens" or target.endpoint == "chat"


def _named(page: Response, names: list[str]) -> str | None:
    """The field that an error is about: by its `param`, else the first of `names` in its text."""
    error = read_error(page.body)
    param = (error.param or "").rpartition(".")[2]
    if param in names:
        return param
    text = error.message or page.body[:1000].decode(errors="replace")
    return next((name for name in names if re.search(rf"\b{name}\b", text)), None)
