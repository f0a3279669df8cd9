"""Estimates the tokens of a response whose replica does not count them. Usage records mark them as estimates.

    text that was received               its size, but at least a token for each chunk
    a response that was not waited for   seconds at the replica times this model's measured tokens per second

The size of a token is not measured: what one key asks for (reasoning that is left out, runs of blanks) would change
what another key pays.
"""

from __future__ import annotations

import math

import msgspec
from msgspec import Raw

from powerband.dispatch.estimates import OutputEstimate

ASCII_PER_TOKEN = 4  # English text has a few more, code a few less
OTHER_BYTES_PER_TOKEN = 3  # of UTF-8: one token for a Chinese character
FIRST_TOKENS_PER_S = 100.0  # of one choice, until a response has been counted: a fast engine's rate
_NOT_ASCII = bytes(range(0x80, 0x100))
_WEIGHT = 0.1  # of the newest in a moving mean
_MIN_TOKENS = 32  # of a response, to learn from it
_MIN_TOKENS_WITH_PROMPT = 256  # if the time includes that of the prompt, which is as long as a client likes
_MAX_TOKENS_PER_S = 1000.0  # more is no generation, but a cache or a proxy that sends a whole response at once


class _Function(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct, gc=False):
    function: _Function | None = None


_CALLS = msgspec.json.Decoder(list[_Call])


class TokenEstimates:
    """Measurements of one model's responses to all keys: only what depends on the servers, not on what a key asks for.

    tokens_per_s: of one choice, while it is generated. tokens_per_chunk: at most 1; of servers that send letters, less.
    """

    def __init__(self) -> None:
        self.tokens_per_s = FIRST_TOKENS_PER_S
        self.tokens_per_chunk = 1.0
        self.output = OutputEstimate()
        self._is_paced = False

    def learn_pace(self, tokens: float, seconds: float, *, has_prompt: bool) -> None:
        """Learn from the tokens of one choice, counted by the replica. has_prompt: `seconds` include the prompt's."""
        if seconds <= 0 or tokens < (_MIN_TOKENS_WITH_PROMPT if has_prompt else _MIN_TOKENS):
            return
        pace = min(tokens / seconds, _MAX_TOKENS_PER_S)
        self.tokens_per_s += (pace - self.tokens_per_s) * (_WEIGHT if self._is_paced else 1.0)
        self._is_paced = True

    def learn_chunks(self, tokens: int, num_chunks: int) -> None:
        """Learn from a stream of `num_chunks` chunks with text, whose tokens the replica has counted."""
        if num_chunks >= _MIN_TOKENS:
            self.tokens_per_chunk += (min(tokens / num_chunks, 1.0) - self.tokens_per_chunk) * _WEIGHT

    def of_whole(self, seconds: float, choices: int, limit: int | None) -> int:
        """Output tokens of all choices after `seconds` at a replica. limit: max_tokens of one choice; None: none."""
        each = math.ceil(seconds * self.tokens_per_s)
        return choices * (each if limit is None else min(each, limit))


class TextTokenCount:
    """Estimates the tokens of a text that arrives in chunks: from its size, and at least `tokens_per_chunk` each."""

    def __init__(self, estimates: TokenEstimates) -> None:
        self.num_chunks = 0
        self._tokens_per_chunk = estimates.tokens_per_chunk
        self._size = 0.0  # in tokens
        self._tokens = 0

    def add(self, text: str) -> int:
        """Add a chunk. Returns by how many tokens the estimate grows."""
        self._size += text_tokens(text)
        self.num_chunks += 1
        before = self._tokens
        self._tokens = max(before, math.ceil(max(self._size, self.num_chunks * self._tokens_per_chunk)))
        return self._tokens - before


def text_tokens(text: str) -> float:
    if text.isascii():
        return len(text) / ASCII_PER_TOKEN
    encoded = text.encode(errors="replace")
    ascii = len(encoded.translate(None, _NOT_ASCII))
    return ascii / ASCII_PER_TOKEN + (len(encoded) - ascii) / OTHER_BYTES_PER_TOKEN


def call_text(calls: Raw) -> str:
    """The text of tool calls that the model generated: names and arguments, without the JSON around them."""
    try:
        found = _CALLS.decode(calls)
    except msgspec.ValidationError:
        return bytes(calls).decode()
    functions = [call.function for call in found if call.function is not None]
    return "".join((one.name or "") + (one.arguments or "") for one in functions)
