"""Estimates the tokens of a response whose replica does not count them. Usage records mark them as estimates.

    text that was received               its size times this model's measured tokens per size
    a response that was not waited for   seconds at the replica times this model's measured tokens per second

Every response that a replica has counted itself refines both. The initial values are rather too high than too low.
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
_MIN_FACTOR, _MAX_FACTOR = 0.25, 4.0


class _Function(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct, gc=False):
    function: _Function | None = None


_CALLS = msgspec.json.Decoder(list[_Call])


class TokenEstimates:
    """Measurements of one model's responses. text_factor: counted tokens per token that `text_tokens` estimates."""

    def __init__(self) -> None:
        self.tokens_per_s = FIRST_TOKENS_PER_S
        self.text_factor = 1.0
        self.output = OutputEstimate()
        self._is_paced = False

    def learn(self, output_tokens: int, choices: int, seconds: float, text_tokens: float) -> None:
        """Learn from a response whose tokens the replica has counted. text_tokens: of its text; 0: not seen."""
        if output_tokens <= 0:
            return
        self.output.observe(output_tokens / choices)
        if seconds > 0:
            pace = output_tokens / choices / seconds
            self.tokens_per_s += (pace - self.tokens_per_s) * (_WEIGHT if self._is_paced else 1.0)
            self._is_paced = True
        if text_tokens > 0:
            factor = min(max(output_tokens / text_tokens, _MIN_FACTOR), _MAX_FACTOR)
            self.text_factor += (factor - self.text_factor) * _WEIGHT

    def of_whole(self, seconds: float, choices: int, limit: int | None) -> int:
        """Output tokens of all choices after `seconds` at a replica. limit: max_tokens of one choice; None: none."""
        each = math.ceil(seconds * self.tokens_per_s)
        return choices * (each if limit is None else min(each, limit))


class TextTokenCount:
    """Estimates the tokens of a text that arrives in pieces, from its size; at least one token per piece."""

    def __init__(self, estimates: TokenEstimates) -> None:
        self.size = 0.0  # in tokens, before the factor
        self._factor = estimates.text_factor
        self._pieces = 0
        self._tokens = 0

    def add(self, text: str) -> int:
        """Add a piece. Returns by how many tokens the estimate grows."""
        self.size += text_tokens(text)
        self._pieces += 1
        before = self._tokens
        self._tokens = max(before, self._pieces, math.ceil(self.size * self._factor))
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
