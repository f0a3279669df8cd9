"""Server-sent events from a replica: cut out of what comes, read as far as is needed, changed where they must be.

Nearly every event is passed on as the bytes that came, less what the gateway asked for and the client did not.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw

from powerband.gateway.proxy.connection import UpstreamFailure

MAX_EVENT_BYTES = 16 << 20
END = b"[DONE]"


class Delta(msgspec.Struct, gc=False):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Any = None  # a list of calls; `Raw | None` would take nothing but null


class Choice(msgspec.Struct, gc=False):
    index: int = 0
    text: str | None = None
    delta: Delta | None = None
    message: Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Details(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: Details | None = None

    @property
    def cached_tokens(self) -> int:
        return (self.prompt_tokens_details and self.prompt_tokens_details.cached_tokens) or 0


class Chunk(msgspec.Struct, gc=False):
    """A chunk of either kind, and a whole answer, too, as far as it is counted."""

    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: Raw | None = None
    prompt_token_ids: list[int] | None = None


_CHUNK = msgspec.json.Decoder(Chunk)
NO_JSON = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


def read_chunk(data: bytes) -> Chunk:
    """Raises UpstreamFailure."""
    try:
        return _CHUNK.decode(data)
    except NO_JSON as problem:
        raise UpstreamFailure("garbage", f"The replica sent what is no answer: {problem}.") from None


class Splitter:
    """Bytes as they come → the data of events that are whole."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """Raises UpstreamFailure when an event has no end."""
        data = self._rest + piece if self._rest else piece
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        if data.endswith(b"\n\n"):
            self._rest = b""
            blocks = data[:-2].split(b"\n\n")
        else:
            *blocks, self._rest = data.split(b"\n\n")
            if len(self._rest) > MAX_EVENT_BYTES:
                raise UpstreamFailure("garbage", "The replica's event has no end.")
        return [data for block in blocks if (data := _data(block))]


def _data(block: bytes) -> bytes:
    """Of one event; b'' for a comment."""
    if block.startswith(b"data:") and b"\n" not in block:
        return block[5:].strip()
    lines = [line[5:].strip() for line in block.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)


def without_list(data: bytes, opening: bytes) -> bytes:
    """JSON without the lists of numbers that begin with `opening`, such as `,"token_ids":[`.

    Within a string a quote is escaped, so that what looks like a field there does not look like this.
    """
    start = data.find(opening)
    while start >= 0:
        data = data[:start] + data[data.index(b"]", start) + 1 :]
        start = data.find(opening, start)
    return data
