"""Prompts out of segments, and the bytes of a request.

The text of a segment is made up from its key: common English words, of which each is one token in the vocabularies
of large models (`Target.words_per_token` corrects for others). Equal keys begin alike, different keys differ from the
first words on, so that a prefix cache finds exactly what the schedule says.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import msgspec

from powerband.bench.client.messages import RequestMessage, SegmentMessage, ServerAddress
from powerband.http_client.connection import request_head

_COMMON = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one
you were all her she there would their we him been has when who will no more if out so up said what its about than
into them can only other time new some could these two may first then do any like my now over such our man me even
most made after also did many off before must well back through years where much your way down should because long
each just state those people too world still between life being under day same another while last might great year
since against work used part go came right come around take three small few every place think house second home
school number water point program business group side general system power country hand order public large fact book
word name form line light city night area real study best company open matter money level table party field music
force road change interest space story plan
"""
WORDS = _COMMON.split()
_STREAM_WORDS = 1 << 16


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
    """The conversation so far, which its next request repeats."""

    def __init__(self, target: ServerAddress, maker: PromptMaker) -> None:
        self._target, self._maker = target, maker
        self._messages: list[dict[str, str]] = []
        self._text = ""

    def body(self, request: RequestMessage) -> bytes:
        """JSON of the request. A turn of 0 begins a new conversation."""
        target = self._target
        if request.turn == 0:
            self._messages, self._text = [], ""
        new = "".join(self._maker.text(segment) for segment in request.segments).rstrip()
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
        if target.ignore_eos:
            fields |= {"ignore_eos": True}
        return msgspec.json.encode(fields | target.extra)

    def answered(self, text: str) -> None:
        if self._target.endpoint == "chat":
            self._messages.append({"role": "assistant", "content": text})
        else:
            self._text += text


def request_bytes(target: ServerAddress, body: bytes) -> bytes:
    """A whole HTTP/1.1 request."""
    authority, _, prefix = target.base.partition("://")[2].partition("/")
    path = (f"/{prefix.rstrip('/')}" if prefix else "") + target.path
    headers = {"Accept": "text/event-stream"} | target.headers
    return request_head("POST", path, authority, len(body), headers) + body
