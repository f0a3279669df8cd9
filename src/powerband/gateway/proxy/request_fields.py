"""What all requests to generate share: reading the fields of a JSON body, and bounds on prompts and responses."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import msgspec
from msgspec import Raw

from powerband.errors import InvalidRequest
from powerband.gateway.accounts.limits import room_for_output
from powerband.web.body_budget import SMALL_BYTES

SLACK_PROMPT_TOKENS = 1 << 16  # of text that templates add to a prompt
# Upper bounds for one token in a response's JSON. The longest tokens of vocabularies are runs of about 128 blanks, and
# an escaped control character takes six bytes; log-probabilities list up to twenty alternatives.
_TOKEN_BYTES = 1024
_TOKEN_BYTES_WITH_LOGPROBS = 64 << 10
_PROMPT_BYTES = 32  # response bytes per byte of the prompt, which may be echoed with its ids
_NOTHING = (b"null", b"false", b'""', b"[]")


class UnsuitableReplica(Exception):
    """The request needs a replica of another engine. error: raised if there is none."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def as_raw(value: Any) -> Raw:
    return Raw(msgspec.json.encode(value))


def asks_for_nothing(value: Raw) -> bool:
    """Whether a field with this value is as good as absent."""
    return bytes(value) in _NOTHING


def without_padding(data: bytes) -> bytes:
    """Valid JSON without blanks between its values, if they are many: the body is kept until the response ends."""
    if len(data) <= SMALL_BYTES:
        return data
    compact = msgspec.json.format(data, indent=-1)
    return compact if len(compact) < len(data) * 7 // 8 else data


def check_case(fields: Mapping[str, Raw], names: Collection[str]) -> None:
    """Reject known field names in another case: servers in Go (Ollama, LocalAI) accept them, evading limits."""
    max_chars = max(map(len, names))
    for name in fields:
        if name not in names and len(name) <= max_chars and (usual := name.casefold()) in names:
            raise InvalidRequest(f"Unknown field '{name}'.", hint=f"Did you mean '{usual}'?", param=name)


def max_text_bytes(prompt: bytes) -> int:
    """Upper bound of the texts' bytes in UTF-8: an escape like \\u4e00 has six bytes, and stands for at most three."""
    # After an escaped backslash it is no escape. All such cases are subtracted, so the result is never too low.
    num_escapes = prompt.count(b"\\u") - prompt.count(b"\\\\u")
    return len(prompt) - 3 * max(num_escapes, 0)


def max_response_bytes(limit: int | None, *, has_logprobs: bool, prompt_bytes: int, num_choices: int = 1) -> int:
    """Upper bound of a valid response's size. limit: tokens of one choice; None: the bound is practically none."""
    if limit is None:
        return 1 << 62
    token_bytes = _TOKEN_BYTES_WITH_LOGPROBS if has_logprobs else _TOKEN_BYTES
    of_prompt = prompt_bytes * (_TOKEN_BYTES_WITH_LOGPROBS if has_logprobs else _PROMPT_BYTES)
    return (1 << 20) + (limit * token_bytes + of_prompt) * num_choices


def capped(cap: int, context: int, max_prompt_tokens: int) -> int:
    """The cap, lowered to a replica's context. If the prompt may not fit, the replica decides."""
    room = room_for_output(context, max_prompt_tokens)
    return min(cap, room) if room > 0 else cap
