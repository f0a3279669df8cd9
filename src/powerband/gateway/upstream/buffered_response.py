"""A response that is not streamed: buffered as it arrives, decoded as far as needed, and passed on with the served
model name.

Decoding 60 MiB of JSON at once would block all other requests for a second. Of a large response, only the surface (its
outer levels, with strings cut short) is decoded; it is extracted slice by slice while the response arrives:

    {"model": "m", "choices": [{"index": 0, "message": {"content": "…"}, "finish_reason": "stop"}], "usage": {…}}
    {"model": "m", "choices": [{"index": 0, "message": {}, "finish_reason": "stop"}], "usage": {…}}
"""

from __future__ import annotations

import asyncio
import codecs
import re
from collections import Counter
from collections.abc import Callable

import msgspec
import numpy as np
from msgspec import Raw
from numpy.typing import NDArray
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from powerband.errors import PowerbandError
from powerband.gateway.upstream.failure import UpstreamFailure
from powerband.openai.chunks import FIELDS, Chunk, InvalidChunk, read_chunk
from powerband.web.turns import FairTurns

MAX_RESPONSE_BYTES = 64 << 20
MAX_HELD_BYTES = 512 << 20  # of all responses that are arriving or not yet sent to their clients
_REDUCE_HINT = "Ask for it as a stream, or for fewer choices, tokens or log-probabilities."
LARGE_BYTES = 1 << 20  # above this, only the surface is decoded: msgspec takes up to 20 ms for 1 MiB
MAX_SURFACE_BYTES = 4 << 20
_SMALL_BYTES = 64 << 10  # responses that are never refused for lack of memory
_SLICE_BYTES = 64 << 10
INSIDE_CHOICES = 3
_STRING_BYTES = 256  # kept of each string on the surface
_QUOTE = ord('"')
_STEPS = np.array([1 if byte in b"[{" else -1 if byte in b"]}" else 0 for byte in range(256)], dtype=np.int8)
# The surface is ASCII without escapes, so that its strings can be cut anywhere.
_PLAIN = bytes(byte if byte < 0x80 and byte != ord("\\") else ord("_") for byte in range(256))
_MODEL = re.compile(rb'"model"[ \t\r\n]*:[ \t\r\n]*("[^"]*"|null)')


class ResponseTooLarge(PowerbandError):
    """A response, or an event of a stream, may be valid, but is larger than the gateway buffers."""

    http_status = 502
    default_code = "answer_too_large"

    def __init__(self, what: str = "response", max_bytes: int = MAX_RESPONSE_BYTES, hint: str = _REDUCE_HINT) -> None:
        super().__init__(f"The {what} is larger than {max_bytes >> 20} MiB.", hint=hint)
        self.max_bytes = max_bytes


class ResponseBudgetExceeded(PowerbandError):
    """The memory for responses that are not streamed is used up, and this response is not small."""

    http_status = 503
    default_code = "too_many_answers"


class ResponseBudget:
    """Limits the memory of buffered responses. One tenant may hold half of it at most."""

    def __init__(self, max_bytes: int = MAX_HELD_BYTES) -> None:
        self.max_bytes = max_bytes
        self.held: Counter[str] = Counter()  # by tenant

    def add(self, tenant: str, size: int, total: int) -> None:
        """Add `size` bytes of a response that has `total` so far. `release` is due even if this raises.

        Raises ResponseBudgetExceeded.
        """
        self.held[tenant] += size
        is_full = self.held[tenant] > self.max_bytes // 2 or self.held.total() > self.max_bytes
        if is_full and total > _SMALL_BYTES:
            raise ResponseBudgetExceeded(
                f"The buffered responses that wait for their clients are larger than {self.max_bytes >> 20} MiB,"
                " or those of one client than half.",
                hint="Read faster, or ask for it as a stream.",
            )

    def release(self, tenant: str, size: int) -> None:
        self.held[tenant] -= size
        if not self.held[tenant]:
            del self.held[tenant]


class BudgetShare:
    """What one request holds of the budget. Call `release` in the end, which is allowed at any time."""

    def __init__(self, budget: ResponseBudget, tenant: str) -> None:
        self._budget, self._tenant = budget, tenant
        self._size = 0

    def add(self, size: int, total: int) -> None:
        """See `ResponseBudget.add`. Raises ResponseBudgetExceeded."""
        self._size += size
        self._budget.add(self._tenant, size, total)

    def release(self) -> None:
        size, self._size = self._size, 0
        self._budget.release(self._tenant, size)


class ResponseScanner:
    """Scans large responses one piece per turn of the event loop, over all requests: a piece takes some milliseconds,
    and other requests run in between. Tenants take turns, however many responses each has.
    """

    def __init__(self) -> None:
        self._turns = FairTurns(1)

    async def add(self, response: BufferedResponse, piece: bytes, tenant: str) -> None:
        """Add a piece to a response. Raises as `BufferedResponse.add` does."""
        if not response.is_large and response.size + len(piece) <= LARGE_BYTES:
            response.add(piece)
            return
        await self._turns.turn(tenant)
        response.add(piece)
        await asyncio.sleep(0)  # by then, the next turn has begun: a response that is alone gets one after another


class BufferedResponse:
    """A buffered response: `add` all pieces, then `read`. size: bytes received."""

    def __init__(self, depth: int = INSIDE_CHOICES) -> None:
        """depth: nesting depth of the deepest fields that are read."""
        self._depth = depth
        self._pieces: list[bytes] = []
        self._surface: _Surface | None = None
        self.size = 0

    @property
    def is_large(self) -> bool:
        """Whether only its surface is decoded."""
        return self._surface is not None

    def add(self, piece: bytes) -> None:
        """Raises UpstreamFailure for invalid UTF-8, and ResponseTooLarge."""
        self._pieces.append(piece)
        self.size += len(piece)
        if self.size > MAX_RESPONSE_BYTES:
            raise ResponseTooLarge
        if self._surface is not None:
            self._surface.add(piece)
        elif self.size > LARGE_BYTES:
            self._surface = _Surface(self._depth)
            for one in self._pieces:
                self._surface.add(one)

    def read(self) -> Chunk:
        """Decode the response. Raises UpstreamFailure if it is not one."""
        try:
            return read_chunk(self.surface(), is_surface=self.is_large)
        except InvalidChunk as problem:
            raise UpstreamFailure.invalid(problem) from None

    def surface(self) -> bytes:
        """The JSON to decode: all of a small response. Raises UpstreamFailure for invalid UTF-8."""
        if self._surface is not None:
            return self._surface.end()
        self._pieces = [b"".join(self._pieces)]
        return self._pieces[0]

    def pieces(self) -> list[bytes]:
        """The pieces as received."""
        return self._pieces

    def renamed(self, model: str) -> list[bytes]:
        """The pieces with the model name replaced. Call it after `read`."""
        name = msgspec.json.encode(model)
        if self._surface is None:
            return [msgspec.json.encode({**FIELDS.decode(self._pieces[0]), "model": Raw(name)})]
        start, end = self._surface.span_of_model()
        if start == end:
            name = b'"model":' + name + b","
        return [*_split(self._pieces, start)[0], name, *_split(self._pieces, end)[1]]


def _split(pieces: list[bytes], at: int) -> tuple[list[bytes], list[bytes]]:
    before = 0
    for number, piece in enumerate(pieces):
        if (cut := at - before) <= len(piece):
            return [*pieces[:number], piece[:cut]], [piece[cut:], *pieces[number + 1 :]]
        before += len(piece)
    return pieces, []


class PiecesResponse(Response):
    """A JSON response in pieces, which are never joined."""

    def __init__(self, pieces: list[bytes], release: Callable[[], None] | None = None) -> None:
        """release: called when the response has been sent, or the client has left."""
        super().__init__(media_type="application/json", headers={"content-length": str(sum(map(len, pieces)))})
        self._pieces = pieces
        self._release = release

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            for piece in self._pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if self._release is not None:
                self._release()


class _Surface:
    """Extracts the surface of JSON: all that is nested at most `max_depth` levels deep, with strings cut short. Also
    records the positions of the outermost level.

    Each slice is scanned with numpy, an array element per byte:

        bytes       {"a":[1],"b":"x[y"}
        in_string   0110000001100111100    a string with its opening quote
        levels      0111112111111111110    brackets are on the level around them
    """

    def __init__(self, max_depth: int) -> None:
        self._max_depth = max_depth
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self._outermost: list[bytes] = []
        self._places: list[NDArray[np.int64]] = []  # positions in the input of the bytes in `_outermost`
        self._position = 0  # in the input, of the next slice
        # At the end of the slices so far:
        self._depth = 0
        self._in_string = False
        self._string_bytes = 0  # bytes of the string that is open
        self._is_escaped = False  # whether the next byte is escaped

    def add(self, piece: bytes) -> None:
        """Raises UpstreamFailure and ResponseTooLarge."""
        try:
            if not piece.isascii() or self._utf8.getstate()[0]:
                self._utf8.decode(piece)
        except UnicodeDecodeError as problem:
            raise UpstreamFailure.invalid(problem) from None
        for start in range(0, len(piece), _SLICE_BYTES):
            self._scan(piece[start : start + _SLICE_BYTES])

    def _scan(self, data: bytes) -> None:
        codes = np.frombuffer(self._without_escapes(data).translate(_PLAIN), dtype=np.uint8)
        in_string = np.logical_xor.accumulate(codes == _QUOTE) ^ self._in_string
        steps = _STEPS[codes]  # 1: an opening bracket, -1: a closing one
        steps[in_string] = 0
        depths = np.cumsum(steps, dtype=np.int32) + self._depth
        levels = depths - (steps > 0)
        # The index at which the string around each byte opened: below 0 if that was in an earlier slice.
        indexes = np.arange(len(codes), dtype=np.int32)
        opened = np.maximum.accumulate(np.where((codes == _QUOTE) & in_string, indexes, -self._string_bytes))
        is_cut = in_string & (indexes - opened > _STRING_BYTES)
        self._keep(codes, levels, ~is_cut)
        self._depth, self._in_string = int(depths[-1]), bool(in_string[-1])
        self._string_bytes = len(codes) - int(opened[-1])

    def _without_escapes(self, data: bytes) -> bytes:
        """The same number of bytes, in which every quote begins or ends a string."""
        if self._is_escaped:
            data = b"_" + data[1:]
        self._is_escaped = bool((len(data) - len(data.rstrip(b"\\"))) % 2)
        return data.replace(b"\\\\", b"__").replace(b'\\"', b"__") if b"\\" in data else data

    def _keep(self, codes: NDArray[np.uint8], levels: NDArray[np.int32], is_short: NDArray[np.bool_]) -> None:
        """Raises ResponseTooLarge if the surface gets too large."""
        self._kept.append(codes[is_short & (levels <= self._max_depth)].tobytes())
        self._kept_bytes += len(self._kept[-1])
        if self._kept_bytes > MAX_SURFACE_BYTES:
            raise ResponseTooLarge("response without its choices", MAX_SURFACE_BYTES)
        is_outermost = is_short & (levels <= 1)
        self._outermost.append(codes[is_outermost].tobytes())
        self._places.append(np.flatnonzero(is_outermost) + self._position)
        self._position += len(codes)

    def end(self) -> bytes:
        """The surface. Raises UpstreamFailure if the input ends in the middle of a UTF-8 character."""
        try:
            self._utf8.decode(b"", final=True)
        except UnicodeDecodeError as problem:
            raise UpstreamFailure.invalid(problem) from None
        return b"".join(self._kept)

    def span_of_model(self) -> tuple[int, int]:
        """Start and end of the model name, quotes included. Without one, both are the place to insert the field."""
        places = np.concatenate(self._places)
        found = _MODEL.search(b"".join(self._outermost))
        if found is None:
            return int(places[0]) + 1, int(places[0]) + 1
        return int(places[found.start(1)]), int(places[found.end(1) - 1]) + 1
