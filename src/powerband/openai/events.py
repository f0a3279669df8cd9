"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html), read and written.

Lines end with LF, CR LF or CR; comments and unknown fields are ignored. Parsing time is linear in the bytes.
"""

from __future__ import annotations

MAX_EVENT_BYTES = 4 << 20
MAX_LINES = 1 << 14  # of one event; servers send one to four
END = b"[DONE]"  # the data of OpenAI's last event
_BOM = b"\xef\xbb\xbf"
_CR, _LF = 13, 10  # bytes.find is five times as fast for an int as for one byte


class EventTooLarge(ValueError):
    """An event is larger than the limit."""


def event(data: bytes) -> bytes:
    """One event with this data, as bytes to send."""
    return b"data: " + data + b"\n\n"


def named_event(type: str, data: bytes) -> bytes:
    """One event of an API whose events have types, as OpenAI's Responses and Anthropic's Messages."""
    return b"event: %b\ndata: %b\n\n" % (type.encode(), data)


DONE = event(END)


class EventReader:
    """Parses a stream: bytes in, the data of complete events out. num_events: events so far, including comments."""

    __slots__ = ("_after_cr", "_ends_line", "_has_begun", "_max_bytes", "_rest", "num_events")

    def __init__(self, max_bytes: int = MAX_EVENT_BYTES) -> None:
        """max_bytes: of one event."""
        self._max_bytes = max_bytes
        self._rest = bytearray()  # an incomplete event
        self._ends_line = False  # whether `_rest` ends with a line end
        self._after_cr = False  # whether the last byte was a CR, which an LF may follow
        self._has_begun = False
        self.num_events = 0

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that this piece completes. Raises EventTooLarge."""
        has_cr = _CR in piece or self._after_cr
        # Fast path: nearly always, a piece is one event of one line.
        is_line = piece.find(_LF) == len(piece) - 2 and piece.endswith(b"\n") and piece.startswith(b"data:")
        if is_line and not (has_cr or self._rest):
            self._has_begun = True
            self.num_events += 1
            data = piece[5:-2].strip()
            return [data] if data else []
        if has_cr:
            piece = self._with_line_feeds(piece)
        if self._rest:
            if b"\n\n" not in piece and not (self._ends_line and piece.startswith(b"\n")):
                self._keep(piece)
                return []
            piece = bytes(self._rest) + piece
            self._rest = bytearray()
        if piece.endswith(b"\n\n"):
            blocks = piece[:-2].split(b"\n\n")
        else:
            *blocks, rest = piece.split(b"\n\n")
            self._keep(rest)
        if not self._has_begun and blocks:
            self._has_begun = True
            blocks[0] = blocks[0].removeprefix(_BOM)
        self.num_events += len(blocks)
        return [data for block in blocks if block and (data := _data(block))]

    def _keep(self, rest: bytes) -> None:
        if not rest:
            return
        self._rest += rest
        self._ends_line = rest.endswith(b"\n")
        if len(self._rest) > self._max_bytes:
            raise EventTooLarge(f"event is larger than {self._max_bytes} bytes")

    def _with_line_feeds(self, piece: bytes) -> bytes:
        if self._after_cr:
            piece = piece.removeprefix(b"\n")
        self._after_cr = piece.endswith(b"\r") or (self._after_cr and not piece)
        return piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _data(block: bytes) -> bytes:
    """The data of one event; b'' for a comment."""
    if block.startswith(b"data:") and b"\n" not in block:
        return block[5:].strip()
    if block.count(b"\n") >= MAX_LINES:
        return block  # unparsed: it is not JSON, so the caller rejects it
    lines = [line[5:].strip() for line in block.split(b"\n") if line.startswith(b"data:")]
    return b" ".join(lines)  # in JSON, a line end is whitespace, so a space can replace it
