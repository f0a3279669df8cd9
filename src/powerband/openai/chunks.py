"""Chunks of a stream and whole responses, as any server may send them: only the fields that Powerband reads.

Other servers leave fields out, send null, and add fields of their own. `server/replies.py` has what Powerband's server
writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Annotated

import msgspec
from msgspec import Meta, Raw

# Decoded objects and lists take far more memory than their JSON. Beyond _FREE_BRACKETS, a response may have one bracket
# per _BYTES_PER_BRACKET bytes. Log-probabilities, the densest valid content, have one in 40.
_FREE_BRACKETS = 1 << 16
_BYTES_PER_BRACKET = 24
# Fields that are passed on and tokens are decoded one by one, so their number is limited, too.
_FREE_COLONS = 1 << 12
_MAX_OTHER_BYTES = 64 << 10
MAX_IDS = 1 << 17  # of one chunk; a prompt's ids are not decoded

NO_ERROR = NO_IDS = _NULL = Raw(b"null")  # the value of missing fields: cheap to compare by identity
TokenIds = list[Annotated[int, Meta(ge=0, le=2**32 - 1)]]
Count = Annotated[int, Meta(ge=0, le=2**40)]
_EMPTY = frozenset((b"null", b"false", b'""', b"{}", b"[]"))
# Fields of an event, a choice and a delta that say nothing by themselves. llama.cpp sends `timings` with the usage.
_EVENT_FIELDS = frozenset(
    (
        *("id", "object", "created", "model", "system_fingerprint", "service_tier"),
        *("choices", "usage", "timings", "prompt_token_ids"),
    )
)
_CHOICE_FIELDS = frozenset(("index", "delta", "finish_reason", "token_ids", "prompt_token_ids"))
_DELTA_FIELDS = frozenset(("role",))


class InvalidChunk(ValueError):
    """The data is not a valid chunk."""


class Part(msgspec.Struct, gc=False):
    """A part of a text that is sent as a list of parts (Mistral and others)."""


Text = str | list[Part] | None


class ChunkDelta(msgspec.Struct, gc=False):
    """A delta or a message. Fields that are only passed on stay undecoded (`Raw`)."""

    role: str | None = None
    content: Text = None
    reasoning_content: Text = None
    reasoning: Text = None
    tool_calls: Raw = _NULL

    @property
    def has_calls(self) -> bool:
        return len(self.tool_calls) > len(b"null")

    @property
    def is_parsed(self) -> bool:
        """Whether it has more than plain text: reasoning, tool calls or parts."""
        has_more = self.reasoning_content or self.reasoning or len(self.tool_calls) > len(b"null")
        return bool(has_more) or isinstance(self.content, list)


class ChunkChoice(msgspec.Struct, gc=False):
    """finish_reason: None or '' (LocalAI and others) until the choice has ended."""

    index: int | None = 0
    text: str | None = None
    delta: ChunkDelta | None = None
    message: ChunkDelta | None = None
    finish_reason: Annotated[str, Meta(max_length=64)] | None = None  # limited, because recent requests keep it
    token_ids: TokenIds | None = None
    prompt_token_ids: Raw = NO_IDS  # decoded only to resume


class ChunkUsageDetails(msgspec.Struct, gc=False):
    cached_tokens: Count | None = None


class ChunkOutputDetails(msgspec.Struct, gc=False):
    reasoning_tokens: Count | None = None


class ChunkUsage(msgspec.Struct, gc=False):
    """completion_tokens include the reasoning."""

    prompt_tokens: Count | None = 0
    completion_tokens: Count | None = 0
    prompt_tokens_details: ChunkUsageDetails | None = None
    completion_tokens_details: ChunkOutputDetails | None = None

    @property
    def cached_tokens(self) -> int:
        return (self.prompt_tokens_details and self.prompt_tokens_details.cached_tokens) or 0

    @property
    def reasoning_tokens(self) -> int | None:
        """None: the server does not count them."""
        return None if self.completion_tokens_details is None else self.completion_tokens_details.reasoning_tokens


class Chunk(msgspec.Struct, gc=False):
    """A chunk of a chat or a completion, or a whole response: the fields that are needed to count tokens."""

    model: str | None = None
    choices: list[ChunkChoice] | None = None
    usage: ChunkUsage | None = None
    error: Raw = NO_ERROR
    prompt_token_ids: Raw = NO_IDS

    @property
    def has_error(self) -> bool:
        return self.error is not NO_ERROR and bytes(self.error) not in _EMPTY


class _LargeParts(msgspec.Struct, gc=False):
    """The fields of a choice that may be large, undecoded."""

    text: Raw = _NULL
    delta: Raw = _NULL
    message: Raw = _NULL
    logprobs: Raw = _NULL
    prompt_logprobs: Raw = _NULL
    token_ids: Raw = _NULL
    prompt_token_ids: Raw = _NULL


class _LargeChunk(msgspec.Struct, gc=False):
    choices: list[_LargeParts] | None = None
    logprobs: Raw = _NULL
    prompt_logprobs: Raw = _NULL
    prompt_token_ids: Raw = _NULL


_CHUNK = msgspec.json.Decoder(Chunk)
_LARGE_CHUNK = msgspec.json.Decoder(_LargeChunk)
FIELDS = msgspec.json.Decoder(dict[str, Raw])
_OPTIONAL_FIELDS = msgspec.json.Decoder(dict[str, Raw] | None)
_CHOICES = msgspec.json.Decoder(list[dict[str, Raw]] | None)
INVALID_JSON = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


def read_chunk(data: bytes, *, is_surface: bool = False) -> Chunk:
    """Decode a chunk. is_surface: data lacks the deep levels, and its fields are not passed on. Raises InvalidChunk."""
    try:
        if not data.isascii():
            data.decode()  # checks UTF-8, also in fields that are only passed on
        if len(data) > _FREE_BRACKETS:
            _check_brackets(data)
            if not is_surface:
                _check_parts(data)
        return _CHUNK.decode(data)
    except INVALID_JSON as problem:
        raise InvalidChunk(str(problem)) from None


def has_unknown_content(data: bytes) -> bool:
    """Whether a chunk has any content that `Chunk` does not read: a field of a delta, a choice or the chunk itself."""
    chunk = FIELDS.decode(data)
    if _has_content(chunk, _EVENT_FIELDS):
        return True
    for choice in _CHOICES.decode(chunk["choices"]) or () if "choices" in chunk else ():
        if _has_content(choice, _CHOICE_FIELDS):
            return True
        delta = _OPTIONAL_FIELDS.decode(choice["delta"]) if "delta" in choice else None
        if delta is not None and _has_content(delta, _DELTA_FIELDS):
            return True
    return False


def _has_content(fields: Mapping[str, Raw], known: Set[str]) -> bool:
    return any(bytes(fields[name]) not in _EMPTY for name in fields.keys() - known)


def count_ids(ids: Raw) -> int:
    """The number of token ids in a JSON list; 0 for null."""
    return bytes(ids).count(b",") + 1 if has_ids(ids) else 0


def has_ids(ids: Raw) -> bool:
    return ids is not NO_IDS and bytes(ids) not in (b"null", b"[]")


def _check_brackets(data: bytes) -> None:
    num_brackets = data.count(b"{") + data.count(b"[")
    if num_brackets > _FREE_BRACKETS + len(data) // _BYTES_PER_BRACKET:
        raise InvalidChunk(f"it has {num_brackets} brackets in {len(data)} bytes")


def _check_parts(data: bytes) -> None:
    """Raise InvalidChunk if there are so many fields or tokens that decoding them would take long."""
    has_many_fields = data.count(b":") > _FREE_COLONS
    if not has_many_fields and data.count(b",") <= MAX_IDS:
        return
    chunk = _LARGE_CHUNK.decode(data)
    parts, choices = [chunk.logprobs, chunk.prompt_logprobs, chunk.prompt_token_ids], chunk.choices or []
    for choice in choices:
        parts += [choice.text, choice.delta, choice.message, choice.logprobs, choice.prompt_logprobs]
        parts += [choice.token_ids, choice.prompt_token_ids]
    other_bytes = len(data) - sum(map(len, parts))
    if has_many_fields and other_bytes > _MAX_OTHER_BYTES:
        raise InvalidChunk(f"it has {other_bytes} bytes in unknown fields")
    num_ids = sum(bytes(choice.token_ids).count(b",") for choice in choices)
    if num_ids >= MAX_IDS:
        raise InvalidChunk(f"it has more than {MAX_IDS} token_ids")
