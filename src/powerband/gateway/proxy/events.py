"""Server-sent events from a replica: cut out of what comes, and read as far as is needed.

The stream is read as the standard says (https://html.spec.whatwg.org/multipage/server-sent-events.html): lines end with
LF, CR LF or CR, comments and unknown fields are ignored. Every byte is looked at a bounded number of times.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Raw

from powerband.gateway.proxy.exchange import UpstreamFailure

MAX_EVENT_BYTES = 4 << 20
END = b"[DONE]"
_BOM = b"\xef\xbb\xbf"
# Objects and lists take far more memory than the bytes that name them: beyond the first so many, at most one in so many
# bytes. Log-probabilities, the densest of right answers, have one in 40.
_FREE_BRACKETS = 1 << 16
_BYTES_PER_BRACKET = 24

NO_IDS = Raw(b"null")
TokenIds = list[Annotated[int, Meta(ge=0, le=2**32 - 1)]]
Count = Annotated[int, Meta(ge=0, le=2**40)]


_NULL = Raw(b"null")
_NO_ERROR = frozenset((b"null", b"false", b'""', b"{}", b"[]"))


class Part(msgspec.Struct, gc=False):
    """Of a text that comes as a list of parts (Mistral and others)."""


Text = str | list[Part] | None


class ChunkDelta(msgspec.Struct, gc=False):
    """What is only passed on, whatever its shape, is not built: `Raw`."""

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
        """Whether it holds more than text: thoughts, calls of tools, parts."""
        return bool(self.reasoning_content or self.reasoning or self.has_calls) or isinstance(self.content, list)


class ChunkChoice(msgspec.Struct, gc=False):
    """finish_reason: None or '' (LocalAI and others) until the choice has ended."""

    index: int | None = 0
    text: str | None = None
    delta: ChunkDelta | None = None
    message: ChunkDelta | None = None
    finish_reason: str | None = None
    token_ids: TokenIds | None = None
    prompt_token_ids: Raw = NO_IDS  # decoded only to resume


class ChunkUsageDetails(msgspec.Struct, gc=False):
    cached_tokens: Count | None = None


class ChunkUsage(msgspec.Struct, gc=False):
    prompt_tokens: Count | None = 0
    completion_tokens: Count | None = 0
    prompt_tokens_details: ChunkUsageDetails | None = None

    @property
    def cached_tokens(self) -> int:
        return (self.prompt_tokens_details and self.prompt_tokens_details.cached_tokens) or 0


class Chunk(msgspec.Struct, gc=False):
    """A chunk of either kind, and a whole answer, too, as far as it is counted."""

    model: str | None = None
    choices: list[ChunkChoice] | None = None
    usage: ChunkUsage | None = None
    error: Raw = _NULL
    prompt_token_ids: Raw = NO_IDS

    @property
    def has_error(self) -> bool:
        return self.error is not _NULL and bytes(self.error) not in _NO_ERROR


_CHUNK = msgspec.json.Decoder(Chunk)
FIELDS = msgspec.json.Decoder(dict[str, Raw])
CHOICES = msgspec.json.Decoder(list[dict[str, Raw]])
NO_JSON = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


def read_chunk(data: bytes) -> Chunk:
    """Raises UpstreamFailure."""
    try:
        if not data.isascii():
            data.decode()  # fields that are only passed on have to be text, too
        if len(data) > _FREE_BRACKETS:
            _check_brackets(data)
        return _CHUNK.decode(data)
    except NO_JSON as problem:
        raise not_understood(problem) from None


def count_ids(ids: Raw) -> int:
    """How many there are in a list of token ids, as JSON; 0 for null."""
    return bytes(ids).count(b",") + 1 if has_ids(ids) else 0


def has_ids(ids: Raw) -> bool:
    return ids is not NO_IDS and bytes(ids) not in (b"null", b"[]")


def not_understood(problem: Exception) -> UpstreamFailure:
    return UpstreamFailure("garbage", f"The replica's answer is not what was asked for: {problem}.")


def _check_brackets(data: bytes) -> None:
    num_brackets = data.count(b"{") + data.count(b"[")
    if num_brackets > _FREE_BRACKETS + len(data) // _BYTES_PER_BRACKET:
        raise UpstreamFailure("garbage", f"The replica's answer has {num_brackets} brackets in {len(data)} bytes.")


class EventSplitter:
    """Bytes as they come → the data of events that are whole. num_events: so far, comments among them."""

    __slots__ = ("_after_cr", "_ends_line", "_has_begun", "_max_bytes", "_rest", "_rest_bytes", "num_events")

    def __init__(self, max_bytes: int = MAX_EVENT_BYTES) -> None:
        """max_bytes: of one event."""
        self._max_bytes = max_bytes
        self._rest: list[bytes] = []  # of an event that is not whole: joined once, when it is
        self._rest_bytes = 0
        self._ends_line = False  # the rest does
        self._after_cr = False  # which may have been the first half of a line's end
        self._has_begun = False
        self.num_events = 0

    def feed(self, piece: bytes) -> list[bytes]:
        """Raises UpstreamFailure when an event has no end."""
        if self._after_cr or b"\r" in piece:
            piece = self._with_line_feeds(piece)
        if self._rest:
            if b"\n\n" not in piece and not (self._ends_line and piece.startswith(b"\n")):
                self._keep(piece)
                return []
            piece = b"".join((*self._rest, piece))
            self._rest, self._rest_bytes = [], 0
        if piece.endswith(b"\n\n"):
            blocks = piece[:-2].split(b"\n\n")
        else:
            *blocks, rest = piece.split(b"\n\n")
            self._keep(rest)
        if not self._has_begun and blocks:
            self._has_begun = True
            blocks[0] = blocks[0].removeprefix(_BOM)
        self.num_events += len(blocks)
        return [data for block in blocks if (data := _data(block))]

    def _keep(self, rest: bytes) -> None:
        if not rest:
            return
        self._rest.append(rest)
        self._rest_bytes += len(rest)
        self._ends_line = rest.endswith(b"\n")
        if self._rest_bytes > self._max_bytes:
            raise UpstreamFailure("too_large", f"The replica's event is larger than {self._max_bytes} bytes.")

    def _with_line_feeds(self, piece: bytes) -> bytes:
        if self._after_cr:
            piece = piece.removeprefix(b"\n")
        self._after_cr = piece.endswith(b"\r") or (self._after_cr and not piece)
        return piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _data(block: bytes) -> bytes:
    """Of one event; b'' for a comment."""
    if block.startswith(b"data:") and b"\n" not in block:
        return block[5:].strip()
    lines = [line[5:].strip() for line in block.split(b"\n") if line.startswith(b"data:")]
    return b" ".join(lines)  # JSON has line ends only where it may have blanks, and is passed on in one line
