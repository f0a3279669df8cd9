"""Prompts out of segments, and the bytes of a request.

The text of a segment is made up from its key: common English words, of which each is one token in the vocabularies
of large models and in that of the demo model (`ServerAddress.words_per_token` corrects for others). Equal keys begin
alike, different keys differ from the first words on, so that a prefix cache finds exactly what the schedule says.
"""

from __future__ import annotations

import hashlib
import math
import random
from typing import Any

import msgspec

from powerband.bench.client.answer_forms import FIELDS, MAX_FORM_TOKENS
from powerband.bench.client.messages import RequestMessage, SegmentMessage, ServerAddress
from powerband.http_client.connection import request_head

_COMMON = """
the of and to in is that for it as was with be by on not he but at are this have from or an they which one you were
all there would their we been has when will no more if out so up what its about than into them can only other time
new some could these two may first then do any like over such man me even most made after also many off before must
well back through where your way should because long each just state those too still between being under day same
another while last year since against work used part go right around take three every place second number point
program group side system hand order public word name form line city real open level table field change space
"""
WORDS = _COMMON.split()
_STREAM_WORDS = 1 << 16
_NO_LIMIT = 1 << 30  # tokens
ONE_TOKEN_A_WORD = 0.02  # words per token may seem to differ from 1 by so much, where each is one
_FIRST_WORD = 3  # tokens more than one, for a word that no space stands before
_ANSWER_RESERVE = 8  # an answer may become longer by this part of it when it is read again


class PromptMaker:
    """Texts of segments for one target."""

    def __init__(self, words_per_token: float = 1.0, salt: str = "") -> None:
        self._words_per_token, self._salt = words_per_token, salt
        generator = random.Random(0)  # noqa: S311 (text, no secret)
        self._stream = generator.choices(WORDS, k=_STREAM_WORDS)

    def text(self, segment: SegmentMessage) -> str:
        """With a space at its end, so that it joins what follows between words."""
        if segment.text is not None:
            return segment.text
        count = max(round(segment.tokens * self._words_per_token), 1)
        digest = int.from_bytes(hashlib.blake2b((self._salt + segment.key).encode(), digest_size=16).digest(), "big")
        words, length = [], len(WORDS)
        # Eight words say which text it is; what follows is cut from one long stream.
        for _ in range(min(8, count)):
            digest, place = divmod(digest, length)
            words.append(WORDS[place])
        start, left = digest % _STREAM_WORDS, count - len(words)
        while left > 0:
            words += self._stream[start : start + left]
            left, start = count - len(words), 0
        return " ".join(words) + " "


class ConversationPrompts:
    """The conversation so far, which its next request repeats.

    A schedule's requests fit the server's context by their numbers of tokens. What the server adds to a prompt, and
    what its tokenizer makes of the words, takes room as well: where that is missing, a prompt gets some words less.
    """

    def __init__(self, target: ServerAddress, maker: PromptMaker) -> None:
        self._target, self._maker = target, maker
        self._messages: list[dict[str, str]] = []
        self._text = ""
        self._history = self._reserve = 0  # tokens of the conversation so far, and how uncertain their number is

    def body(self, request: RequestMessage) -> bytes:
        """JSON of the request. A turn of 0 begins a new conversation."""
        target = self._target
        if request.turn == 0 or self._room(request) < 1:
            self._messages, self._text = [], ""
            self._history = self._reserve = 0
        segments = _shortened(request.segments, self._room(request))
        self._history += sum(segment.tokens for segment in segments) + request.output_tokens
        self._history += target.extra_prompt_tokens
        self._reserve = request.output_tokens // _ANSWER_RESERVE
        new = "".join(self._maker.text(segment) for segment in segments).rstrip()
        fields: dict[str, Any] = {
            "model": target.model,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "temperature": 0.0,
        }
        if target.endpoint == "chat":
            self._messages.append({"role": "user", "content": new})
            fields |= {"messages": self._messages, "max_tokens": request.output_tokens}
        else:
            self._text = f"{self._text} {new}" if self._text else new
            fields |= {"prompt": self._text, "max_tokens": request.output_tokens}
        if target.form != "text":
            fields |= {**FIELDS[target.form], "max_tokens": max(request.output_tokens, MAX_FORM_TOKENS)}
        if target.ignore_eos:
            fields |= {"ignore_eos": True}
        for name in target.rejected_fields:
            _leave_out(name, fields)
        return msgspec.json.encode(fields | target.extra)

    def answered(self, text: str, tokens: int = 0) -> None:
        """tokens: of the whole conversation, by the server's count; 0: not counted."""
        self._history = tokens or self._history
        if self._target.endpoint == "chat":
            self._messages.append({"role": "assistant", "content": text})
        else:
            self._text += text

    def _room(self, request: RequestMessage) -> int:
        """Tokens that new text may have."""
        target = self._target
        if target.max_model_len is None:
            return _NO_LIMIT
        taken = request.output_tokens + self._history + target.extra_prompt_tokens
        room = target.max_model_len - taken - self._reserve - _FIRST_WORD
        is_exact = abs(target.words_per_token - 1) < ONE_TOKEN_A_WORD
        return room if is_exact or room < 1 else room - math.ceil(2 * math.sqrt(room))  # words of unequal tokens


def _leave_out(name: str, fields: dict[str, Any]) -> None:
    if name == "continuous_usage_stats":
        fields["stream_options"] = {"include_usage": True}
    else:
        value = fields.pop(name, None)
        if name == "max_tokens":
            fields["max_completion_tokens"] = value


def _shortened(segments: tuple[SegmentMessage, ...], tokens: int) -> tuple[SegmentMessage, ...]:
    """With a last one short enough for the sum, of at least one token."""
    excess = sum(segment.tokens for segment in segments) - tokens
    if excess <= 0:
        return segments
    *first, last = segments
    left = max(last.tokens - excess, 1)
    text = last.text[: max(len(last.text) * left // last.tokens, 1)] if last.text else last.text
    return (*first, SegmentMessage(last.key, left, text))


def request_bytes(target: ServerAddress, body: bytes) -> bytes:
    """A whole HTTP/1.1 request."""
    authority, _, prefix = target.base.partition("://")[2].partition("/")
    path = (f"/{prefix.rstrip('/')}" if prefix else "") + target.path
    headers = {"Accept": "text/event-stream"} | target.headers
    return request_head("POST", path, authority, len(body), headers) + body
