"""Finds the end of a request's body: by Content-Length or by the chunked coding (RFC 9112, 7.1). Bytes behind the body
are left, since they belong to the next request.

Only the content is kept: chunk extensions and trailers are size-limited, validated and dropped.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import Protocol

from powerband.web.errors import HttpError

MAX_TRAILER_BYTES = 8 << 10
MAX_FRAMING_BYTES = 16 << 10  # more framing than content: a large body in one-byte chunks would take minutes to read
MAX_EXTENSION_BYTES = 8 << 10  # of all chunks together
MAX_CHUNKS_AT_ONCE = 200  # per turn of the event loop; takes less than a millisecond
_MAX_SIZE_LINE = 1 << 10
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*+;[^\x00-\x08\x0a-\x1f\x7f]*+)?")
_TRAILER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++:[^\x00-\x08\x0a-\x1f\x7f]*+")


class Framing(Protocol):
    """is_complete: the body has ended. has_more: `take` stopped early, and should be called again."""

    is_complete: bool
    has_more: bool

    def take(self, data: bytearray) -> bytes:
        """Remove the body's bytes from the beginning of `data`. Returns their content. Raises HttpError 400."""


class LengthFraming:
    has_more = False

    def __init__(self, length: int) -> None:
        self._left = length
        self.is_complete = length == 0

    def take(self, data: bytearray) -> bytes:
        content = bytes(data[: self._left])
        del data[: self._left]
        self._left -= len(content)
        self.is_complete = self._left == 0
        return content


class _Part(Enum):
    SIZE = auto()
    DATA = auto()
    DATA_END = auto()
    TRAILERS = auto()


class ChunkedFraming:
    def __init__(self) -> None:
        self.is_complete = False
        self.has_more = False
        self._part = _Part.SIZE
        self._left = 0  # of the chunk
        self._extension_bytes = 0
        self._framing_bytes = 0  # framing minus content, at least 0, so earlier large chunks earn no credit
        self._trailer_bytes = 0

    def take(self, data: bytearray) -> bytes:
        pieces: list[bytearray] = []
        start, chunks, is_starved = 0, 0, False
        while not (self.is_complete or is_starved or chunks == MAX_CHUNKS_AT_ONCE):
            before = start
            if self._part is _Part.DATA:
                pieces.append(data[start : start + self._left])
                start += len(pieces[-1])
                self._left -= len(pieces[-1])
                if not self._left:
                    self._part = _Part.DATA_END
            elif self._part is _Part.DATA_END:
                start = self._end_chunk(data, start)
            else:
                start = self._read_line(data, start)
                chunks += 1
            is_starved = start == before
        del data[:start]
        self.has_more = not (self.is_complete or is_starved)
        return b"".join(pieces)

    def _end_chunk(self, data: bytearray, start: int) -> int:
        if not b"\r\n".startswith(data[start : start + 2]):
            raise _invalid("A chunk is longer than its size")
        if len(data) < start + 2:
            return start
        self._part = _Part.SIZE
        return start + 2

    def _read_line(self, data: bytearray, start: int) -> int:
        """A chunk's size, or a trailer. Returns `start` while the line has no end."""
        is_size = self._part is _Part.SIZE
        limit = start + (_MAX_SIZE_LINE if is_size else MAX_TRAILER_BYTES - self._trailer_bytes)
        end = data.find(b"\r\n", start, limit)
        if end < 0:
            if len(data) >= limit:
                raise _invalid("A chunk's size has no end" if is_size else _too_long_trailers())
            return start
        line = data[start:end]
        if is_size:
            self._take_size(line)
        elif line:
            if not _TRAILER.fullmatch(line):
                raise _invalid("A trailer is no header")
            self._trailer_bytes += len(line) + 2
        else:
            self.is_complete = True
        return end + 2

    def _take_size(self, line: bytearray) -> None:
        found = _SIZE_LINE.fullmatch(line)
        if found is None:
            raise _invalid("A chunk's size is no hexadecimal number")
        self._extension_bytes += len(line) - found.end(1)
        if self._extension_bytes > MAX_EXTENSION_BYTES:
            raise _invalid(f"The extensions of chunks are larger than {MAX_EXTENSION_BYTES} bytes")
        self._left = int(found[1], 16)
        self._framing_bytes = max(0, self._framing_bytes + len(line) + 4 - self._left)
        if self._framing_bytes > MAX_FRAMING_BYTES:
            raise _invalid(f"The chunks have {MAX_FRAMING_BYTES} bytes more of framing than of content")
        self._part = _Part.DATA if self._left else _Part.TRAILERS


def framing_of(length: int | None) -> Framing:
    """length: in bytes; None: in chunks."""
    return ChunkedFraming() if length is None else LengthFraming(length)


def _too_long_trailers() -> str:
    return f"The trailers are larger than {MAX_TRAILER_BYTES} bytes"


def _invalid(what: str) -> HttpError:
    return HttpError(400, "invalid_http", f"{what}.")
